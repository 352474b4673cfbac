from mini import world
from uvrb import DATASETS


def texts(scene, rng):
    """One text of the world, any form, for plain language modelling."""
    forms = [lambda: world.video_caption(scene, rng.choice(world.VIDEO_STYLES), rng, True)[0],
             lambda: world.frame_caption(scene, rng.choice(world.FRAME_STYLES), rng, True)[0],
             lambda: world.spatial(scene, rng, True)[0], lambda: world.temporal(scene, rng)[0], lambda: world.main_object(scene, rng)[0],
             lambda: world.camera(scene, rng)[0], lambda: world.theme(scene, rng)[0], lambda: world.detail(scene, rng)[0],
             lambda: world.story({"scenes": [scene, scene]}, rng)[0], lambda: rng.choice([d.prompt for d in DATASETS.values()] + list(INSTRUCTIONS.values()))]
    return rng.choice(forms)()


INSTRUCTIONS = {  # of the training sources, in the spirit of Table 5 but not its strings
    "t2t": "Find a text that describes the same scene.", "t2i": "Find the image that matches the given description.",
    "i2t": "Find the text description that corresponds to the given image.", "i2i": "Find an image of the same scene according to the given image.",
    "ti2i": "Find the image that corresponds to the given text and the given image.",
    "t2v": "Find the clip that matches the described scene.", "t2v-general": "Find the video that includes the general text description.",
    "t2v-spatial": "Find the video according to the spatial description of its objects.",
    "t2v-object": "Find the video that shows the described main object.",
    "t2v-temporal": "Find the video according to the temporal description of its events.",
    "t2v-camera": "Find the video that has the described camera motion.", "t2v-event": "Find a video that includes the described event.",
    "t2v-theme": "Find the clip that matches the theme information.", "t2v-keywords": "Find the video that matches a series of keywords.",
    "t2v-detail": "Find the video that matches the detailed text description.", "t2v-long": "Find the long video that matches the long text description.",
    "i2v": "Find the video that contains the given image.", "v2v": "Find the long video that contains the given short video clip.",
    "ti2v": "Find the video clip that matches the image changed by the text.", "tv2v": "Find the video clip that matches the video changed by the text."}

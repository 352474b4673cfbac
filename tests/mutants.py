r"""Break one line at a time and see a test fail: `python tests/mutants.py`, minutes on one core.

    python tests/mutants.py --only train.py     those whose file, function or new line holds this
    python tests/mutants.py --jobs 4            four at a time
    python tests/mutants.py --functions         public functions in which nothing is broken

A test that passes over a broken line tests nothing there. MUTANTS has faults of the kinds that a
careful person makes: in every public function of the root and of kernels/, and in everything that a
main program hands to a function. Each is

    @ FILE: TEST FILE::beginning of the test's name, more of them
    - the line as it stands, once in its file (or several on end)
    + the line with the fault

Two tests in tests/test_wiring.py use this file: each line still stands (by default), and each fault
is caught (slow).
"""

import argparse
import ast
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for a mutant's tests

LIST = r"""
# train.py: the schedule

@ train.py: test_wiring::a_run_is_the_loop
- return np.exp(z - z.max())
+ return np.exp(z - z.max()) * sizes

@ train.py: test_train::source_probabilities
- z = relevance / sigma_t
+ z = relevance * sigma_t

@ train.py: test_train::sigma_and
- return sizes
+ return np.sqrt(sizes)

@ train.py: test_train::sigma_and
- return np.ones(len(sizes))
+ return np.asarray(sizes)

@ train.py: test_wiring::a_run_with_every_setting
- return sizes * (levels == level)
+ return sizes * (levels <= level)

@ train.py: test_train::an_unknown_schedule
- if name not in SCHEDULES:
+ if name is None:

@ train.py: test_train::quotas_that_end
- if not candidates.any():
+ if candidates is None:

@ train.py: test_wiring::a_run_is_the_loop
- return low + (high - low) * epoch / (epochs - 1)
+ return low + (high - low) * epoch / epochs

@ train.py: test_wiring::a_run_is_the_loop
- subset = every[: self.rows[k]]
+ subset = every

@ train.py: test_train::sampler_deals
- return np.random.default_rng([self.seed, k, pass_number]).permutation(subset)
+ return np.random.default_rng([self.seed, k]).permutation(subset)

@ train.py: test_wiring::a_run_is_the_loop
- return [drawn / rows for drawn, rows in zip(self.drawn, self.rows, strict=True)]
+ return [drawn // rows for drawn, rows in zip(self.drawn, self.rows, strict=True)]

@ train.py: test_wiring::a_run_is_the_loop
- self.drawn[k] += len(rows)
+ self.drawn[k] += self.batch[k]

@ train.py: test_wiring::a_run_with_every_setting
- share += p / len(steps)
+ share = p

@ train.py: test_wiring::a_run_is_the_loop
- if step < rise:
+ if False:

@ train.py: test_train::learning_rate
- return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
+ return peak * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))

# train.py: the loss and GradCache

@ train.py: test_loss::shares_and_gradients
- dist.all_reduce(gradient)
+ pass

@ train.py: test_loss::shares_and_gradients
- start = sum(ctx.counts[:rank])
+ start = rank * ctx.counts[rank]

@ train.py: test_loss::the_plain_loss
- drop |= scores > thresholds[own][:, None]
+ drop |= scores > thresholds[own]

@ train.py: test_loss::the_plain_loss
- drop |= scores > thresholds
+ drop |= scores > thresholds[:, None]

@ train.py: test_loss::auto_takes
- return batch * batch * (1 + negatives) >= FUSED_FROM
+ return batch * (1 + negatives) >= FUSED_FROM

@ train.py: test_train::grad_cache_replays
- self.generator.set_state(before)
+ pass

@ train.py: test_wiring::a_run_with_every_setting
- start += len(vectors)
+ start += 0

# train.py: probing and mining

@ train.py: test_wiring::a_run_is_the_loop
- return float(mean), float((variance / max(n - 1, 1)).sqrt())
+ return float(mean), float((variance / n).sqrt())

@ train.py: test_train::hard_negatives
- false = scores > positive + margin
+ false = scores > positive

@ train.py: test_wiring::a_run_with_every_setting
- best, which = scores.masked_fill(right | false, -torch.inf).topk(k)
+ best, which = scores.masked_fill(false, -torch.inf).topk(k)

@ train.py: test_wiring::a_run_is_the_loop
- q, q_failed = encode(gve, [query for _, query, _ in loaded], source.instruction, **options)
+ q, q_failed = encode(gve, [query for _, query, _ in loaded], **options)

@ train.py: test_wiring::a_run_is_the_loop
- p, p_failed = encode(gve, [positive for _, _, positive in loaded], **options)
+ p, p_failed = encode(gve, [p for _, _, p in loaded], source.instruction, **options)

@ train.py: test_wiring::a_run_is_the_loop
- rows = np.random.default_rng([flags.seed, k]).permutation(len(source))
+ rows = np.arange(len(source))

@ train.py: test_train::hard_negatives
- margin = None if flags.margin < 0 else flags.margin
- device = prober.device
+ margin = None
+ device = prober.device

@ train.py: test_wiring::a_run_with_every_setting
- mined[row] = [pairs[i][2] for i in negatives if i >= 0]
+ mined[row] = [pairs[i][2] for i in negatives[1:] if i >= 0]

@ train.py: test_wiring::a_run_with_every_setting
- if other == k and source.negatives:
+ if source.negatives:

@ train.py: test_wiring::mined_negatives
- source.mined = {int(row): items for row, items in mined.items()}
+ source.mined = {}

# train.py: what main and its helpers hand on

@ train.py: test_wiring::a_run_is_the_loop
- sources += load_mixture(mixture, [flags.data, *flags.root])
+ sources += load_mixture(mixture, [*flags.root])

@ train.py: test_wiring::a_run_that_stops
- self.file.truncate(length)
+ pass

@ train.py: test_wiring::a_run_with_every_setting
- store.keep(batch)
+ pass

@ train.py: test_wiring::a_run_is_the_loop
- hardest = scores.masked_fill(answers, -1).amax(1)
+ hardest = scores.amax(1)

@ train.py: test_wiring::a_run_is_the_loop
- "scores": scores.sum(),
+ "scores": scores.diagonal().sum(),

@ memory.py: test_memory::a_task_s_items
- text = TEXT_TOKENS if "T" in form else 0
+ text = 0

# memory.py

@ memory.py: test_wiring::a_dry_run
- items = min(items, max(1, micro_tokens // self.tokens))
+ items = max(1, micro_tokens // self.tokens)

@ memory.py: test_memory::the_arithmetic
- kept_by_layers = (layers - 1) * kept * tokens
+ kept_by_layers = layers * kept * tokens

@ memory.py: test_memory::a_config_alone
- "AdamW": 2 * trained,
+ "AdamW": trained,

@ memory.py: test_memory::the_loss_takes
- matrices += rows * ranks * rows * (3 * FLOAT + 1)
+ matrices += rows * ranks * rows * (2 * FLOAT + 1)

@ memory.py: test_memory::a_step_counts
- counted = self.micro_batch(shape, kept - self.kept(shape))
+ counted = self.micro_batch(shape)

@ memory.py: test_memory::a_whole_step
- kept = sum(self.kept(role) for role in roles)
+ kept = self.kept(roles[-1])

# train.py: the rest

@ train.py: test_wiring::a_run_is_the_loop
- torch.manual_seed(flags.seed)  # LoRA starts equal on every rank
+ torch.manual_seed(42)

@ train.py: test_train::the_same_run_twice
- lora = {"lora_dropout": flags.dropout}
+ lora = {"lora_dropout": 0.0}

@ train.py: test_wiring::a_run_is_the_loop
- lora = {"lora_dropout": flags.dropout}
+ lora = {}

@ train.py: test_wiring::train_hands_on
- if flags.checkpointing:
+ if False:

@ train.py: test_wiring::a_run_is_the_loop
- weight_decay=flags.weight_decay,
+ weight_decay=0.01,

@ train.py: test_wiring::gve_json
- "rows": len(source),
+ "rows": source.samples,

@ train.py: test_wiring::a_run_is_the_loop
- sampler = Sampler(sources, flags.batch_scale, flags.seed)
+ sampler = Sampler(sources, seed=flags.seed)

@ train.py: test_wiring::a_run_is_the_loop
- sampler = Sampler(sources, flags.batch_scale, flags.seed)
+ sampler = Sampler(sources, flags.batch_scale)

@ train.py: test_wiring::a_run_is_the_loop
- tau = flags.temperature
+ tau = 0.03

@ train.py: test_wiring::a_run_is_the_loop
- roots = [flags.data, *flags.root]
+ roots = [flags.data]

@ train.py: test_wiring::train_hands_on
- micro_batch=flags.micro_batch,
+ micro_batch=32,

@ train.py: test_wiring::train_hands_on
- micro_tokens=flags.micro_tokens,
+ micro_tokens=0,

@ train.py: test_wiring::train_hands_on
- compute_loss = LOSSES[flags.loss]
- fused = []  # (K,) by the global batch, so that all ranks choose alike
+ compute_loss = LOSSES["infonce"]
+ fused = []

@ train.py: test_wiring::train_hands_on
- peak = peak_flops(device, flags.dtype)
+ peak = peak_flops(device, "bfloat16")

@ train.py: test_wiring::a_run_is_the_loop
- sigma_t = sigma(epoch, flags.epochs, high=flags.sigma_max)
+ sigma_t = sigma(epoch, flags.epochs)

@ train.py: test_wiring::a_run_is_the_loop
- if epoch == 0 and flags.prober and (schedule["probes"] or flags.remine):
+ if flags.prober and (schedule["probes"] or flags.remine):

@ train.py: test_wiring::a_run_is_the_loop
- prober = GVE.from_pretrained(flags.prober, dtype=flags.dtype, device=device)
+ prober = GVE.from_pretrained(flags.base, dtype=flags.dtype, device=device)

@ train.py: test_wiring::train_hands_on
- prober = GVE.from_pretrained(flags.prober, dtype=flags.dtype, device=device)
+ prober = GVE.from_pretrained(flags.prober, device=device)

@ train.py: test_wiring::a_run_with_every_setting
- mine_epoch(prober, sources, plan, flags, mined)
+ mine_epoch(gve, sources, plan, flags, mined)

@ train.py: test_wiring::a_run_with_every_setting
- progress=step / total,
+ progress=steps.start / total,

@ train.py: test_train::an_epoch_draws_by_relevance_among
- candidates = left > 0
+ candidates = left >= 0

@ train.py: test_train::an_epoch_draws_by_relevance_among
- left -= taken
+ pass

@ train.py: test_train::the_papers_mixtures
- "reverse": dict(weigh=reverse_weights, probes=True, quotas=True),
+ "reverse": dict(weigh=reverse_weights, probes=True, quotas=False),

@ train.py: test_train::an_epoch_draws_by_relevance_among
- "pyramid": dict(weigh=pyramid_weights, probes=True, quotas=True),
+ "pyramid": dict(weigh=pyramid_weights, probes=True, quotas=False),

@ train.py: test_train::an_epoch_draws_by_relevance_among
- return pyramid_weights(-relevance, sigma_t, sizes, levels, progress)
+ return pyramid_weights(relevance, sigma_t, sizes, levels, progress)

@ train.py: test_train::quotas_are
- largest_first = np.argsort(-remainders, kind="stable")
+ largest_first = np.argsort(remainders, kind="stable")

@ train.py: test_train::the_papers_mixtures
- one_pass = -(-np.asarray(samples) // np.asarray(batch))  # rounded up
+ one_pass = np.asarray(samples) // np.asarray(batch)

@ train.py: test_train::relevance_by_task
- relevance = relevance_by_task(relevance, sizes, tasks)
+ relevance = relevance_by_task(relevance, [1] * len(tasks), tasks)

@ train.py: test_train::sources_of_a_task
- sums[task] += r * size
+ sums[task] += r

@ train.py: test_train::sampler_deals
- steps.append(passes * -(-rows // batch) + -(-rest // batch))
+ steps.append(-(-drawn // batch))

@ train.py: test_wiring::a_run_that_stops
- taken=sampler.taken(),
+ taken=None,

@ train.py: test_wiring::a_run_that_stops
- stream = load(plan[step - of_epoch.start :])
+ stream = load(plan)

@ train.py: test_wiring::a_run_is_the_loop
- p_ids = batch.positive.ids.to(device)
+ p_ids = torch.arange(len(p))

@ train.py: test_wiring::a_run_is_the_loop
- n_ids = batch.negative.ids.to(device)
+ n_ids = torch.arange(len(n)) - len(n)

@ train.py: test_wiring::a_run_is_the_loop
- tau=tau,
- margin=margin,
+ tau=tau,

@ train.py: test_wiring::a_run_is_the_loop
- margin = None if flags.margin < 0 else flags.margin
- tau = flags.temperature
+ margin = 0.1
+ tau = flags.temperature

@ train.py: test_wiring::a_run_with_every_setting
- made = caches[role].forward(micro_batches)
+ made = caches["query"].forward(micro_batches)

@ train.py: test_wiring::a_run_with_every_setting
- vectors[role] = made[group.order.to(device)]
+ vectors[role] = made

@ train.py: test_wiring::a_run_is_the_loop
- norm = float(torch.nn.utils.clip_grad_norm_(parameters, flags.clip or math.inf))
+ norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf))

@ train.py: test_wiring::a_run_is_the_loop
- lr = learning_rate(step, steps, flags.lr, flags.warmup)
+ lr = learning_rate(step, steps, flags.lr, 0.0)

@ train.py: test_wiring::a_run_is_the_loop
- parameter_group["lr"] = lr
+ pass

@ train.py: test_wiring::a_run_is_the_loop
- optimizer.zero_grad(set_to_none=True)
+ pass

@ train.py: test_wiring::train_hands_on
- if step % flags.log_every == 0 or step == steps:
+ if True:

@ train.py: test_wiring::a_run_that_stops
- due = flags.save_every and step % flags.save_every == 0
+ due = False

@ train.py: test_wiring::a_run_that_stops
- save_state(out / "state", optimizer, rng, facts, flags.keep)
+ save_state(out / "state", optimizer, rng, facts, 1)

@ train.py: test_train::a_checkpoint_names
- data[sources[k].name] = {"rows": len(sources[k]), "drawn": drawn}
+ data[sources[k].name] = {"rows": len(sources[k]), "drawn": sampler.drawn[k]}

@ train.py: test_wiring::gve_json
- gve.save_pretrained(out, info=info)
+ gve.save_pretrained(out)

@ train.py: test_wiring::a_run_that_stops
- "epoch_start": start,
+ "epoch_start": None,

@ support/checkpoint.py: test_wiring::a_run_that_stops
- optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
+ pass

# data.py

@ data.py: test_data::wrong_items
- or not spec.keys() <= {path_key} | NUMBER_KEYS[kind]
+ or not spec.keys()

@ data.py: test_data::a_sibling_folder
- if not any(os.path.commonpath([path, root]) == root for root in allowed):
+ if not any(path.startswith(root) for root in allowed):

@ data.py: test_data::content_ids
- for kind, path_key in PATH_KEY.items():
- media = item.get(kind)
- if not isinstance(media, dict):
+ for kind, path_key in [("image", "video")]:
+     media = item.get(kind)
+     if not isinstance(media, dict):

@ data.py: test_wiring::the_prompt_letter
- lead = f"{instruction}\n"
+ lead = f"{instruction} "

@ data.py: test_model::the_pooled_token
- ids = ids[: text_end - excess] + ids[text_end:]
+ ids = ids[: self.max_length]

@ data.py: test_model::vectors_do_not_depend
- mask[row, start : start + length] = 1
+ mask[row, start:] = 1

@ data.py: test_model::inputs_and_hidden
- std = torch.tensor(processor.image_std).repeat_interleave(repeats) * scale
+ std = torch.tensor(processor.image_std).repeat(repeats) * scale

@ data.py: test_train::hard_negatives
- negatives = self.mined.get(row, []) + negatives
+ negatives = negatives + self.mined.get(row, [])

@ data.py: test_wiring::a_run_is_the_loop
- items = [entry["query"], entry["positive"], *negatives[: self.negatives]]
+ items = [entry["query"], entry["positive"], *negatives]

@ data.py: test_check_data::every_bad_row
- return f"{self.path}:{self.index[row, 1]}"
+ return f"{self.path}:{row}"

@ data.py: test_data::wrong_mixtures
- names.add(source.name)
+ pass

@ data.py: test_data::micro_batches_hold
- long = 0 < max_tokens < (len(last) + 1) * lengths[i]
+ long = 0 < max_tokens < len(last) * lengths[i]

@ data.py: test_wiring::a_run_is_the_loop
- instruction = source.instruction if n == 0 else None  # the query's alone
+ instruction = source.instruction

@ data.py: test_data::an_unusable_row
- result = self.pool((k, (row + attempt) % len(self.sources[k])))
+ result = self.pool((k, (row - attempt) % len(self.sources[k])))

@ data.py: test_data::vectors_find
- order = torch.tensor(places, dtype=torch.int64).argsort()
+ order = torch.tensor(places, dtype=torch.int64)

@ data.py: test_data::ranks_share
- own = rows[self.rank :: self.world]
+ own = rows[self.rank :]

# model.py

@ model.py: test_model::pool_takes
- last = hidden.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # (B,)
+ last = attention_mask.sum(1) - 1

@ model.py: test_model::mean_pool
- return hidden.masked_fill(padding, 0).sum(1) / attention_mask.sum(1, keepdim=True)
+ return hidden.masked_fill(padding, 0).mean(1)

@ model.py: test_model::positions_equal_the_rule
- extent = torch.stack([((t - 1) * rate * tokens_per_second).long(), h - 1, w - 1]).amax(0) + 1
+ extent = torch.stack([(t * rate * tokens_per_second).long(), h - 1, w - 1]).amax(0) + 1

@ model.py: test_model::geometry_is_read
- merge_size=vision.spatial_merge_size,
+ merge_size=vision.temporal_patch_size,

@ model.py: test_model::inputs_and_hidden
- embeds = embeds.masked_scatter(place, features)
+ pass

@ model.py: test_model::in_bfloat16
- with torch.autocast(position_ids.device.type, torch.bfloat16, enabled=is_bfloat16):
+ with torch.autocast(position_ids.device.type, torch.bfloat16, enabled=False):

@ model.py: test_embed::vectors_are_those
- tokens_per_second=self.geometry.tokens_per_second,
+ tokens_per_second=4,

@ model.py: test_model::a_store_gives
- missing = [i for i, known in enumerate(features) if known is None]
+ missing = list(range(len(features)))

@ model.py: test_model::a_checkpoint_is_loaded
- pooled = POOLINGS[self.pooling](hidden, batch["attention_mask"])  # (B, D)
+ pooled = POOLINGS["last_token"](hidden, batch["attention_mask"])

@ model.py: test_eval::the_command_scores
- return F.normalize(pooled, dim=-1)
+ return F.normalize(pooled, dim=0)

@ model.py: test_model::sentence_transformers
- processor.chat_template = make_chat_template(self.spec.timed_grids)
+ pass

@ model.py: test_model::saved_folder
- full.model.load_state_dict(backbone.state_dict())
+ pass

@ model.py: test_wiring::a_base_is_found
- for root in (Path(), Path(adapter), Path(__file__).resolve().parent):
+ for root in (Path(), Path(__file__).resolve().parent):

@ model.py: test_released::every_layout
- shards = sorted(set(index["weight_map"].values()))
+ shards = sorted(set(index["weight_map"].values()))[:1]

@ model.py: test_released::every_layout
- return "language_model." + key
+ return key

@ model.py: test_model::the_dropout
- config.lora_dropout = lora["lora_dropout"]
+ pass

@ model.py: test_model::a_tensor_without
- if without_place or missing:
+ if missing:

@ model.py: test_model::the_saved_chat_template
- {%- for part in message.content if part.type == 'video' %}{{- VIDEO }}{%- endfor %}
- {%- for part in message.content if part.type == 'image' %}{{- IMAGE }}{%- endfor %}
+ {%- for part in message.content if part.type == 'image' %}{{- IMAGE }}{%- endfor %}
+ {%- for part in message.content if part.type == 'video' %}{{- VIDEO }}{%- endfor %}

@ model.py: test_model::sentence_transformers
- "pooling_mode": their_names.get(pooling, pooling),
+ "pooling_mode": "mean",

# embed.py

@ embed.py: test_embed::only_equal
- vectors[equals] = vectors[[first[keys[i]] for i in equals]]
+ pass

@ embed.py: test_embed::results_come
- reasons = {i: failed[first[key]] for i, key in enumerate(keys) if first[key] in failed}
+ reasons = {}

@ embed.py: test_embed::another_model
- "instruction": instruction,
+ "instruction": None,

@ model.py: test_embed::batches_hold
- width = length
- batch[i] = sample
+ width = 0
+ batch[i] = sample

@ embed.py: test_embed::top_k_is_exact
- indices[own] = torch.where(columns < k, earlier, start + columns - k)
+ indices[own] = torch.where(columns < k, earlier, columns - k)

@ embed.py: test_wiring::embed_hands
- items, failed = resolve_all(rows, names, folder, flags.root)
+ items, failed = resolve_all(rows, names, folder, [])

@ embed.py: test_wiring::embed_hands
- flags.instruction or None,
+ None,

@ embed.py: test_wiring::embed_hands
- batch_tokens=flags.batch_tokens,
+ batch_tokens=4096,

@ embed.py: test_wiring::embed_hands
- seconds=flags.seconds,
+ seconds=60,

@ embed.py: test_wiring::embed_hands
- frames=flags.frames,
+ frames=8,

@ embed.py: test_wiring::embed_hands
- max_tokens=flags.max_tokens,
+ max_tokens=200,

# eval.py

@ eval.py: test_eval::ranks_agree
- c = torch.nn.functional.normalize(part.float(), dim=-1)
+ c = part.float()

@ eval.py: test_eval::metrics_equal_trec_evals_with_ties
- query_positions.append(1 + int(above + ties_before))
+ query_positions.append(1 + int(above))

@ eval.py: test_eval::metrics_equal_trec_evals
- values[f"R@{k}"] = sum(rank <= k for rank in positions) / count
+ values[f"R@{k}"] = sum(rank <= k for rank in positions) / min(k, count)

@ eval.py: test_eval::median_and_mean
- average = np.median if name == "MdR" else np.mean
+ average = np.mean

@ eval.py: test_eval::chance_is
- values.append(positives / candidates)
+ values.append(min(1, int(k) / candidates))

@ eval.py: test_eval::ceiling_is
- values = [min(int(k), p) / (p if kind == "R" else int(k)) for p in counts]
+ values = [min(int(k), p) / p for p in counts]

@ eval.py: test_wiring::a_query_that_lost
- if i in encoded.lost_queries or len(kept) < len(positives):
+ if i in encoded.lost_queries or not kept:

@ eval.py: test_eval::a_benchmark_smaller
- "complete": n == expected and m == expected_corpus,
+ "complete": n == expected,

@ eval.py: test_eval::bootstrap
- return [float(rng.choice(scores, len(scores)).mean()) for _ in range(times)]
+ return [float(rng.permutation(scores).mean()) for _ in range(times)]

@ eval.py: test_wiring::eval_hands
- order = scores.argsort(descending=True, stable=True)[:depth]
+ order = scores.argsort(stable=True)[:depth]

@ eval.py: test_eval::only_complete
- if entry["complete"]:
+ if entry["n"]:

@ eval.py: test_wiring::an_interval
- bounds[column] = np.percentile(values, (2.5, 97.5)).tolist()
+ bounds[column] = np.percentile(values, (5, 95)).tolist()

@ eval.py: test_wiring::eval_hands
- batch_tokens=flags.batch_tokens,
- workers=flags.workers,
+ workers=flags.workers,

@ eval.py: test_wiring::eval_hands
- frames=frames,
- max_tokens=max_tokens,
+ frames=frames,

@ eval.py: test_wiring::a_function_of
- batch_size=size,
+ batch_size=32,

@ eval.py: test_wiring::eval_hands
- corpora, lost, damaged = encode_rows(rows, None, "corpora")
+ corpora, lost, damaged = encode_rows(rows, benches[0].dataset.prompt, "corpora")

@ eval.py: test_wiring::eval_hands
- prompt = bench.dataset.prompt
+ prompt = benches[0].dataset.prompt

@ eval.py: test_eval::any_model
- start = stop
+ start = 0

@ eval.py: test_eval::missing_extra
- vectors[known] = self.array[places]
+ vectors[known] = self.array[: len(places)]

@ eval.py: test_wiring::eval_hands
- entry = score(encoded, bootstrap=flags.bootstrap)
+ entry = score(encoded)

@ eval.py: test_wiring::eval_hands
- if flags.rankings and entry["n"]:
+ if False:

@ eval.py: test_wiring::eval_hands
- cache = VectorCache(out / "cache", gve)
+ cache = VectorCache("runs/cache", gve)

@ eval.py: test_wiring::each_number
- encoder = checkpoint_encoder(gve, cache, flags, frames, max_tokens)
+ encoder = checkpoint_encoder(gve, cache, flags, flags.frames[0], max_tokens)

@ eval.py: test_wiring::each_number
- protocol = protocol_of(gve, flags, frames, max_tokens)
+ protocol = protocol_of(gve, flags, 8, max_tokens)

@ eval.py: test_wiring::eval_shows
- show(names, results, flags.out or "runs/tables", flags.uvrb, flags.root)
+ show(names, results, flags.out or "runs/tables", flags.uvrb)

@ eval.py: test_wiring::eval_hands
- names = list(dict.fromkeys(flags.datasets))
+ names = []

@ eval.py: test_wiring::eval_hands
- benches = [uvrb.read(flags.uvrb, name, flags.root) for name in names]
+ benches = [uvrb.read(flags.uvrb, name) for name in names]

@ eval.py: test_wiring::eval_hands
- model = flags.name or Path(scored).name
+ model = Path(scored).name

@ eval.py: test_wiring::eval_hands
- show(with_numbers(names, results), results, out, flags.uvrb, flags.root, brief=True)
+ show(with_numbers(names, results), results, out, flags.uvrb, brief=True)

# synth.py

@ synth.py: test_wiring::synth_hands
- self.pairs_per_video = read_task_numbers(self.shares, per_video, float)
+ self.pairs_per_video = read_task_numbers([], per_video, float)

@ synth.py: test_wiring::synth_hands
- self.negatives_per_pair = read_task_numbers(self.negatives, per_pair, int)
+ self.negatives_per_pair = read_task_numbers([], per_pair, int)

@ synth.py: test_wiring::synth_hands
- return GVE.from_pretrained(name, device=self.flags.device)
+ return GVE.from_pretrained("mini/prober", device=self.flags.device)

@ synth.py: test_wiring::synth_hands
- frames=self.flags.frames,
+ frames=8,

@ synth.py: test_wiring::synth_hands
- max_tokens=self.flags.max_tokens,
+ max_tokens=200,

@ synth.py: test_wiring::synth_hands
- seconds=self.flags.seconds,
+ seconds=60,

@ synth.py: test_synth::vectors_of_nan
- vectors[i] = 0
+ pass

@ synth.py: test_synth::odd_folders
- for file in visible_files(path):
+ for file in sorted(path.glob("*")):

@ synth.py: test_synth::cuts_clips
- cuts = ((change > 8) & (change > 1.5 * around)).nonzero()[:, 0] + 1
+ cuts = (change > 8).nonzero()[:, 0] + 1

@ synth.py: test_synth::a_red_ball
- change = shot.amax(0) - shot.amin(0)  # (3, 32, 32)
+ change = shot.mean(1, keepdim=True).amax(0) - shot.mean(1, keepdim=True).amin(0)

@ synth.py: test_synth::a_captioner_s_wrong_name
- split_captioner(flags.captioner)
+ pass

@ synth.py: test_wiring::synth_draws
- if len(chosen) < KEY_FRAMES and all(difference > 4 for difference in differences):
+ if len(chosen) < KEY_FRAMES:

@ synth.py: test_wiring::synth_gives
- row["consistency"] = max(row["consistency"], cosine(vector, texts[n]))
+ row["consistency"] = cosine(vector, texts[n])

@ synth.py: test_wiring::synth_hands
- drop_inconsistent(rows, flags.consistency)
+ drop_inconsistent(rows, "0.999")

@ synth.py: test_wiring::synth_hands
- drop_duplicates(rows, flags.duplicate)
+ drop_duplicates(rows, 0.1)

@ synth.py: test_wiring::synth_draws
- tasks += [task] * int(share + rng.random())
+ tasks += [task] * int(share)

@ synth.py: test_wiring::synth_hands
- wanted = make_requests(job["kind"], [job["item"]], flags.prompts, rng, job["text"])
+ wanted = make_requests(job["kind"], [job["item"]], flags.prompts, rng)

@ synth.py: test_wiring::synth_hands
- return texts[-2], texts[-1]
+ return texts[-1], texts[-1]

@ synth.py: test_wiring::synth_hands
- return {"text": rng.choice(list(frame["captions"].values()))}, frame["item"]
+ return texts[0], video.item

@ synth.py: test_wiring::synth_hands
- reference = pool.videos[rng.choice(similar)]
+ reference = target

@ synth.py: test_wiring::synth_hands
- requests += make_requests(pair.task, [pair.query, pair.positive], flags.prompts, rng)
+ requests += make_requests(pair.task, [pair.positive, pair.query], flags.prompts, rng)

@ synth.py: test_synth::hard_negatives
- excluded |= scores > scores[target.row]
+ pass

@ synth.py: test_synth::hard_negatives
- excluded = pool.matrix @ target.vector >= TWIN  # the target itself among them
+ excluded = torch.zeros(len(scores), dtype=torch.bool)

@ synth.py: test_wiring::synth_hands
- entry = {"path": name, "samples": samples, "negatives": flags.negatives_per_pair[task]}
+ entry = {"path": name, "samples": samples}

@ synth.py: test_wiring::synth_hands
- samples = round(share * made["T2V"]) or len(pairs[task])
+ samples = 1

@ synth.py: test_synth::another_flag
- if begun.get(key) != now.get(key):
+ if key == "videos" and begun.get(key) != now.get(key):

@ synth.py: test_wiring::synth_hands
- concurrency=flags.concurrency,
+ concurrency=32,

@ synth.py: test_wiring::synth_hands
- parts = cut(rows, flags.part)
+ parts = cut(rows, 256)

@ synth.py: test_wiring::synth_hands
- checked = run_sharded(out, "1-pool", parts, do, flags.shard)
+ checked = run_sharded(out, "1-pool", parts, do)

@ synth.py: test_wiring::synth_hands
- if flags.stages < 2:
+ if False:

@ synth.py: test_wiring::synth_hands
- if flags.stages < 3:
+ if False:

@ synth.py: test_wiring::synth_hands
- caption_vectors=caption_embedder(join(captions), prober),
+ caption_vectors=caption_embedder([], prober),

@ synth.py: test_wiring::synth_hands
- print_dry_run(len(rows), shares, flags.prompts, flags.frames, flags.max_tokens)
+ print_dry_run(len(rows), shares, flags.prompts, 8, flags.max_tokens)

# caption.py

@ caption.py: test_synth::texts_that
- if 3 * len(letters) > 4 * in_script:
+ if False:

@ caption.py: test_synth::full_prompts
- focus=rng.choices(list(FOCUS), list(FOCUS.values()))[0],
+ focus=rng.choice(list(FOCUS)),

@ caption.py: test_wiring::synth_hands
- answer_words = sum((least + most) / 2 for least, most in request["want"].values())
+ answer_words = sum(most for least, most in request["want"].values())

@ caption.py: test_synth::frames_go_out
- pixels, seconds = load_video(item["video"], frames)
+ pixels, seconds = load_video(item["video"], 2)

@ caption.py: test_synth::every_way
- answer.tokens = [answer.tokens[0] + reply.tokens_read, answer.tokens[1] + reply.tokens_written]
+ answer.tokens = [reply.tokens_read, reply.tokens_written]

@ caption.py: test_wiring::a_captioner
- return server_captioner(url, model, concurrency=concurrency, **options)
+ return server_captioner(url, model, **options)

@ caption.py: test_wiring::a_captioner
- return transformers_captioner(model, device=device, **options)
+ return transformers_captioner(model, device="cpu", frames=8)

# uvrb.py

@ uvrb.py: test_uvrb::table_2
- means["TXT"] = mean([means["CG"], means["FG"], means["LC"]])
+ means["TXT"] = mean([means["CG"], means["S"], means["T"], means["PR"], means["LC"]])

@ uvrb.py: test_uvrb::table_2
- result["AVG-A"] = mean([means[tag] for tag in ABILITIES[:6]])
+ result["AVG-A"] = mean([means[tag] for tag in ABILITIES])

@ uvrb.py: test_uvrb::a_missing_dataset
- return None if None in values else sum(values) / len(values)
+ return sum(v or 0 for v in values) / len(values)

@ uvrb.py: test_uvrb::every_accepted
- for folder in (root / name, root / name / "UVRB" / name, root / "UVRB" / name):
+ for folder in (root / name, root / name / "UVRB" / name):

@ uvrb.py: test_wiring::sizes_that
- datasets[key] = declared.get(key, dataset._replace(queries=None, corpus=None))
+ datasets[key] = declared.get(key, dataset)

@ uvrb.py: test_uvrb::benchmark_json_defines
- return Dataset(name, entry["task"], domain, entry["metric"], *sizes.values(), entry["prompt"])
+ return Dataset(name, entry["task"], domain, "R@1", *sizes.values(), entry["prompt"])

@ uvrb.py: test_uvrb::each_bad_row
- if key in first:
+ if False:

@ uvrb.py: test_uvrb::lines_of
- found.add(corpus_of[key])
+ found |= {corpus_of[ids[0]]}

@ uvrb.py: test_uvrb::media_are_found
- places += [base / path, base / "videos" / path, base / "images" / path]
+ places += [base / "videos" / path, base / path, base / "images" / path]

@ uvrb.py: test_uvrb::check_command
- bad += problems + bench.missing
+ bad += problems

@ uvrb.py: test_wiring::uvrb_hands
- bad = check(flags.dir, flags.root, flags.decode, flags.show)
+ bad = check(flags.dir, flags.root, flags.decode)

@ uvrb.py: test_wiring::uvrb_hands
- sys.exit(1 if bad else 0)
+ sys.exit(0)

# tables.py

@ tables.py: test_tables::published_rows
- return all(result["benchmark"] == "UVRB" for result in results)
+ return any(result["benchmark"] == "UVRB" for result in results)

@ tables.py: test_tables::published_rows
- return f"{value:.3f}".replace("0.", ".", 1)
+ return f"{value:.2f}".replace("0.", ".", 1)

@ tables.py: test_tables::score_tables_show
- marked[dataset] = cell(entry["score"]) + "*"
+ marked[dataset] = cell(entry["score"])

@ tables.py: test_wiring::tables_show_ones
- return "video" if "V" in row["task"] else "image"
+ return "image" if "I" in row["task"] else "video"

@ tables.py: test_tables::score_tables_and_curves
- gain = a * math.log(10)  # of y, where x grows tenfold
+ gain = a * math.log(2)

@ tables.py: test_tables::correlations_equal
- return pearson(mean_ranks(x), mean_ranks(y))
+ return pearson(np.argsort(x), np.argsort(y))

@ tables.py: test_wiring::table_4_counts
- candidates = int(np.median([len(pool) for pool in bench.pools]))
+ candidates = max(len(pool) for pool in bench.pools)

@ tables.py: test_tables::published_errata
- if abs(check.printed - check.computed) > check.tolerance:
+ if abs(check.printed - check.computed) > 1:

@ tables.py: test_tables::the_pyramids_table
- left = sum(quota[member] for member in members) - used
+ left = sum(quota[member] for member in members) + used

@ tables.py: test_tables::a_measured_row
- group.extend(self.reruns.get(row.get("model"), []))
+ pass

@ tables.py: test_tables::a_measured_row
- rounded = round(measured - published_score, 3) + 0.0  # -0.0 + 0.0 is 0.0
+ rounded = round(published_score - measured, 3) + 0.0

@ tables.py: test_tables::a_difference_is_marked
- if not low - ROUNDING <= published_score <= high + ROUNDING:
+ if not low <= published_score <= high:

@ tables.py: test_tables::a_result_may_say
- if name is not None and name not in known:
+ if False:

@ tables.py: test_tables::a_result_may_say
- name = name or result["model"]
+ name = result["model"]

@ tables.py: test_tables::table_10_has
- count = result["protocol"].get("parameters", result.get("parameters"))
+ count = result["protocol"].get("parameters")

@ tables.py: test_tables::a_difference_is_marked
- lines.append("  ! the published score lies outside the measured one's bootstrap interval")
+ pass

@ tables.py: test_tables::no_row_of_another_benchmark
- if comparable(results) and model in printed_scores and has_numbers:
+ if model in printed_scores and has_numbers:

@ tables.py: test_tables::later_rows
- if column in unlike and row[column] is not None:
+ if column not in unlike and row[column] is not None:

@ tables.py: test_tables::table_10_has
- counts[model] = count
+ counts[model] = facts["size"]

@ tables.py: test_tables::published_errata
- wrong = contradicted(check_tables_1_and_2(later))
+ wrong = contradicted(check_tables_1_and_2(paper))

# kernels/

@ kernels/infonce.py: test_infonce::twin_equals
- dropped |= cosines > cosines.gather(1, target[:, None]).detach() + margin
+ dropped |= cosines > cosines.gather(1, target[:, None]).detach() - margin

@ kernels/infonce.py: test_infonce::twin_equals
- dropped.logical_or_(cosines > masks.threshold[:, None])
+ pass

@ kernels/infonce.py: test_infonce::twin_equals
- positive_weight = positive_weight + reverse
+ pass

@ kernels/infonce.py: test_infonce::twin_equals
- full_lse = row_lse.including(LogSum(positive, torch.zeros_like(positive)), scale)
+ full_lse = row_lse

@ kernels/infonce.py: test_infonce::interpreter_passes
- factor = torch.ldexp(torch.ones_like(scale), largest.frexp().exponent)
+ factor = torch.ones_like(scale)

@ kernels/infonce.py: test_loss::shares_and_gradients
- dd = _reduce_scatter(dd)  # this rank's candidates again
+ dd = dd[: len(dd) // world]

@ kernels/infonce.py: test_loss::shares_and_gradients
- dist.all_reduce(col_weight)
+ pass

@ kernels/infonce.py: test_loss::shares_and_gradients
- return loss.sum() / total
+ return loss.sum() / len(q)

@ kernels/infonce.py: test_infonce::bad_input_names
- if reduction not in ("mean", "none"):
+ if False:

@ kernels/infonce.py: test_wiring::a_run_with_every_setting
- loss = losses.mean(0) if symmetric else losses[0]
+ loss = losses.mean(0)

@ kernels/infonce.py: test_infonce::kernels_compile
- "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=4),
+ "hopper": dict(BM=128, BN=256, BK=64, WIDTH=256, num_warps=8, num_stages=4),

@ kernels/infonce.py: test_infonce::kernels_compile
- "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=4),
+ "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=5),

@ kernels/infonce.py: test_infonce::kernels_compile
- "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=8, num_stages=4),
+ "hopper": dict(BM=128, BN=256, BK=64, WIDTH=32, num_warps=2, num_stages=4),

@ kernels/infonce.py: test_infonce::kernels_compile
- inside = (i < N)[:, None] & (j < stride_grad)[None, :]
+ inside = (i < N)[:, None] & (j < M)[None, :]

@ kernels/infonce.py: test_infonce::kernels_compile
- tl.store(col_sum_ptr + col_offset, col_sum, mask=j < M)
+ tl.store(col_sum_ptr + col_offset, tl.exp(tl.log(col_sum)), mask=j < M)

@ kernels/windows.py: test_model::windows_of_one
- scale=scaling,
+ scale=1.0,

@ kernels/windows.py: test_model::inputs_and_hidden
- return F.linear(patches.to(weight.dtype), weight, self.proj.bias)
+ return F.linear(patches.to(weight.dtype), weight.flip(1), self.proj.bias)

@ kernels/windows.py: test_backbones::inputs_and_vectors
- return F.linear(patches.to(weight.dtype), weight, self.proj.bias)
+ return F.linear(patches.to(weight.dtype), weight)

@ kernels/windows.py: test_model::windows_of_one
- visual.config._attn_implementation = NAME
+ pass

@ kernels/__init__.py: test_infonce::transformers_finds
- __path__ += _other.submodule_search_locations
+ pass

# The functions that are left, file by file

@ train.py: test_loss::shares_and_gradients
- padded[: len(rows)] = rows
+ pass

@ train.py: test_loss::shares_and_gradients
- if not dist.is_initialized():
- return rows
+ if True:
+     return rows

@ train.py: test_wiring::a_run_with_every_setting
- self.batches.append(batch)
+ self.batches = [batch]

@ train.py: test_wiring::a_run_is_the_loop
- return {s.name: round(float(v), 5) for s, v in zip(sources, values, strict=True)}
+ return {s.name: round(float(v), 2) for s, v in zip(sources, values, strict=True)}

@ train.py: test_wiring::a_run_is_the_loop
- line = {"event": name, "time": round(time.time(), 3), **values}
+ line = {"time": round(time.time(), 3), **values, "event": name.upper()}

@ data.py: test_model::a_store_sees
- key = [kind, media, file_fingerprint(path), *protocol]
+ key = [kind, media, *protocol]

@ data.py: test_model::inputs_and_hidden
- seconds_per_grid = processor.temporal_patch_size * clip.seconds / self.frames
+ seconds_per_grid = clip.seconds / self.frames

@ data.py: test_wiring::a_clip_has
- "longest_edge": self.max_tokens[kind] * pixels_per_token * counted,
+ "longest_edge": 200 * pixels_per_token * counted,

@ data.py: test_backbones::limits_hold
- counted = self.frames
+ counted = 1

@ data.py: test_backbones::inputs_and_vectors
- middles = (times[:, 0] + times[:, -1]) / 2
+ middles = times[:, 0]

@ data.py: test_model::inputs_and_hidden
- system = instruction or DEFAULT_INSTRUCTION
+ system = DEFAULT_INSTRUCTION

@ data.py: test_backbones::qwen3_vl_embedding
- system += "."
+ pass

@ data.py: test_backbones::qwen3_writes
- return [f"<{time:.1f} seconds>{VISION_BLOCK[kind]}" for time in times]
+ return [f"<{time:.2f} seconds>{VISION_BLOCK[kind]}" for time in times]

@ data.py: test_backbones::qwen3_vl_embedding
- prompt += self.appended
+ pass

@ support/cache.py: test_backbones::a_store_gives
- names.append("grid_times")
+ pass

@ support/media.py: test_backbones::qwen3_writes
- times = timeline.times[choose(timeline)] - timeline.times[first]
+ times = timeline.times[choose(timeline)]

@ model.py: test_backbones::qwen2_positions
- ones = torch.ones(len(video_grid_thw))
+ ones = second_per_grid_ts

@ model.py: test_backbones::qwen3_positions
- return grid_positions(token_types, attention_mask, image_grid_thw, grids, merge_size=merge_size)
+ return grid_positions(
+     token_types, attention_mask, image_grid_thw, video_grid_thw, merge_size=merge_size
+ )

@ model.py: test_backbones::inputs_and_vectors
- layers = [torch.cat(out.pooler_output), *out.deepstack_features]
+ layers = [torch.cat(out.pooler_output), *reversed(out.deepstack_features)]

@ model.py: test_backbones::inputs_and_vectors
- mixed[place[places]] = features.to(mixed)
+ mixed[: len(features)] = features.to(mixed)

@ model.py: test_backbones::qwen3_vl_embedding
- if name.lower() in Path(path).name.lower():
+ if name.lower() == Path(path).name.lower():

@ support/flops.py: test_backbones::a_step_costs
- per_patch_pair = 4 * geometry.tower_width
+ per_patch_pair = 4 * text.hidden_size

@ data.py: test_wiring::a_row_is_named
- return self.sources[k].where(row)
+ return self.sources[k].where(0)

@ embed.py: test_embed::the_commands_prompt
- lambda item: collate.prepare(item, instruction),
+ lambda item: collate.prepare(item),

@ eval.py: test_eval::any_model
- queries, lost_queries = query_file.pick("query", bench.queries, bench.name)
+ queries, lost_queries = query_file.pick("corpus", bench.queries, bench.name)

@ eval.py: test_wiring::a_protocol
- pairs += min(source["rows"], source["drawn"])
+ pairs += source["drawn"]

@ model.py: test_model::inputs_and_hidden
- return core.get_video_features(pixels, grids).pooler_output
+ return core.get_video_features(pixels.flip(0), grids).pooler_output

@ model.py: test_model::lora_sits
- return {name: p for name, p in self.named_parameters() if p.requires_grad}
+ return dict(self.named_parameters())

@ model.py: test_embed::the_commands_prompt
- lambda item: collate.prepare(item, instruction),
+ lambda item: collate.prepare(item),

@ model.py: test_model::an_unknown_model_type
- if model_type not in BACKBONES:
+ if model_type is None:

@ model.py: test_model::incomplete_folders
- except (OSError, ValueError, TypeError, ImportError) as error:
+ except ImportError as error:

@ model.py: test_released::every_layout
- tensors.pop("lm_head.weight", None)
+ pass

@ model.py: test_released::one_wrong
- if wrong:
+ if False:

@ model.py: test_model::incomplete_folders
- _raise_exceptions_for_missing_entries=False,
+ _raise_exceptions_for_missing_entries=True,

@ model.py: test_wiring::model_py_prints
- trained = sum(p.numel() for p in lora.values())
+ trained = len(lora)

@ uvrb.py: test_uvrb::each_bad_row
- if bad:
- raise ValueError("\n".join(first_few(bad, 5, f"more: python uvrb.py check {root}")))
+ if False:
+     raise ValueError("\n".join(bad))

@ uvrb.py: test_wiring::eval_hands
- allowed = [root, *bases[1:]]
+ allowed = [root]

@ uvrb.py: test_uvrb::each_bad_row
- self.bad.append(str(error))
+ pass

@ uvrb.py: test_uvrb::each_bad_row
- data.check_item(item)
+ pass

@ synth.py: test_wiring::synth_hands
- numbers[task] = kind(number)
+ numbers[task] = 1

@ synth.py: test_wiring::synth_drops
- row["why"] = why
+ pass

@ synth.py: test_synth::mini_makes
- return [i for i, row in enumerate(rows) if row["fate"] == "kept"]
+ return list(range(len(rows)))

@ synth.py: test_wiring::synth_draws
- return rng.sample(clips, min(len(clips), CLIPS))
+ return clips[:1]

@ synth.py: test_wiring::synth_measures
- ("static", row["motion"], flags.min_motion),
+ ("static", row["motion"], 0),

@ synth.py: test_wiring::synth_hands
- seconds=PATIENCE * flags.seconds,
+ seconds=flags.seconds,

@ synth.py: test_wiring::synth_hands
- np.save(file, vectors.half().numpy())
+ np.save(file, 0 * vectors.half().numpy())

@ synth.py: test_wiring::synth_drops
- if "consistency" in row and row["consistency"] < limit:
+ if "consistency" in row and row["consistency"] > limit:

@ synth.py: test_wiring::synth_drops
- limit = float(np.quantile(scores, limit))
+ pass

@ synth.py: test_wiring::synth_drops
- alike = others[n][agreement[n] >= least * n_bits].tolist()
+ alike = others[n][agreement[n] >= least].tolist()

@ synth.py: test_wiring::synth_drops
- first = min(alike, default=n)  # the earliest stays
+ first = max(alike, default=n)

@ synth.py: test_wiring::synth_drops
- down = tiny.diff(dim=1) > 0
+ down = tiny.diff(dim=1) > -255

@ synth.py: test_wiring::synth_draws
- return {"image": {"video": self.path, "time": rng.choice(self.key_frames)}}
+ return {"image": {"video": self.path, "time": self.key_frames[0]}}

@ synth.py: test_wiring::synth_draws
- start, end = rng.choice(self.clips or [(0, min(CLIP_SECONDS[1], self.duration))])
+ start, end = rng.choice(self.clips or [(0, self.duration)])

@ synth.py: test_wiring::synth_hands
- if "T2I" not in draw_tasks(video, flags):
+ if True:

@ synth.py: test_wiring::synth_draws
- worst = min(answers, key=lambda answer: ("failed", "dropped", "kept").index(answer.fate))
+ worst = answers[0]

@ synth.py: test_wiring::synth_hands
- row["reference"] = self.reference
+ pass

@ synth.py: test_wiring::synth_hands
- frames[row["of"]] = row
+ frames = {row["of"]: row}

@ synth.py: test_wiring::synth_hands
- if pair.ranks and pair.ranks[0] >= pair.ranks[1]:
+ if pair.ranks and pair.ranks[0] > pair.ranks[1]:

@ synth.py: test_wiring::synth_draws
- return int((scores > scores[row]).sum()) + 1
+ return int((scores >= scores[row]).sum()) + 1

@ synth.py: test_synth::mini_makes
- relative[key] = os.path.relpath(inner, folder)
+ relative[key] = os.path.basename(inner)

@ synth.py: test_wiring::synth_draws
- if row["fate"] == "kept" and row["kind"] == "video":
+ if row["fate"] == "kept":

@ synth.py: test_wiring::synth_draws
- return max(-1, round(float(a @ b), 4))
+ return abs(round(float(a @ b), 4))

@ caption.py: test_synth::bad_answers
- if not least <= n <= most:
+ if not n <= most:

@ caption.py: test_wiring::captioner_media
- scale = math.sqrt(max_tokens * TOKEN_SIDE**2 / (height * width))
+ scale = max_tokens * TOKEN_SIDE**2 / (height * width)

@ caption.py: test_synth::frames_go_out
- shown = load_media(request["media"], frames, max_tokens)
+ shown = load_media(request["media"], 4, max_tokens)

@ caption.py: test_synth::frames_go_out
- for frame in one.pixels:
- jpeg = io.BytesIO()
+ for frame in one.pixels[:1]:
+     jpeg = io.BytesIO()

@ caption.py: test_wiring::captioner_media
- while waiting:
- yield waiting.popleft().result()
+ while waiting:
+     yield waiting.pop().result()

@ caption.py: test_wiring::a_captioner_answers
- processor.tokenizer.padding_side = "left"
+ processor.tokenizer.padding_side = "right"

@ caption.py: test_synth::the_mini_captioner
- output = output[:, inputs["input_ids"].shape[1] :]  # (B, T), without the prompt
+ output = output[:, 1:]

@ caption.py: test_synth::the_mini_captioner
- geometry.temporal_patch_size / frames * seconds,  # per temporal grid
+ 1 / frames * seconds,

@ tables.py: test_tables::score_tables_show
- every = (published, later, self.yours, self.bounds, self.mixed)
+ every = (published, later, self.yours, self.mixed)

@ tables.py: test_wiring::a_table_in_four
- lines.append([cell(row.get(column)) for column in columns])
+ lines.append([cell(value) for value in row.values()])

@ tables.py: test_wiring::a_table_in_four
- cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
+ cells = [first.ljust(widths[0]), *map(str.ljust, others, widths[1:])]

@ tables.py: test_wiring::a_table_in_four
- alignment = ["---"] + ["---:"] * (len(head) - 1)
+ alignment = ["---"] + ["---:"] * len(head)

@ tables.py: test_wiring::a_table_in_four
- writer.writerows(itertools.chain(*sections))
+ writer.writerows(sections[0])

@ tables.py: test_wiring::a_table_in_four
- columns = "l" + "r" * (len(sections[0][0]) - 1)
+ columns = "l" + "r" * len(sections[0][0])

@ tables.py: test_wiring::a_table_in_four
- return re.sub(r"([%&#_$])", r"\\\1", text)
+ return re.sub(r"([%&#$])", r"\\\1", text)

@ tables.py: test_tables::every_table
- return name.lower().replace(" ", "")
+ return name.lower()

@ tables.py: test_tables::any_cell
- computed = sum(cells[name] for name in uvrb.ZERO_SHOT) / len(uvrb.ZERO_SHOT)
+ computed = cells["AVG"]

@ tables.py: test_tables::score_tables_and_curves
- average = sum(zero_shot) / len(zero_shot)
+ average = max(zero_shot)

@ tables.py: test_tables::datasets_of_a_folders_own
- return [name for name in names if name not in uvrb.DATASETS and name not in uvrb.ZERO_SHOT]
+ return [name for name in names if name in uvrb.ZERO_SHOT]

@ tables.py: test_wiring::tables_show_ones
- values = {**values, "AVG": values.get(AVERAGES[name])}
+ values = {**values, "AVG": values.get("AVG-D")}

@ tables.py: test_tables::score_tables_show
- if 0 < len(absent) < len(uvrb.DATASETS):
+ if False:

@ tables.py: test_tables::table_4
- columns = ("queries", "corpus", "duration_s", "words")
+ columns = ("queries", "corpus", "words")

@ tables.py: test_wiring::tables_show_ones
- rows.append({"dataset": name, **{column: values[column] for column in columns}})
+ rows.append({"dataset": name, **{column: values[column] for column in columns[1:]}})

@ tables.py: test_wiring::tables_show_ones
- row[column] = getattr(dataset, column) or None
+ row[column] = None

@ tables.py: test_wiring::table_4_counts
- return float(np.mean(values)) if values else None
+ return float(np.max(values)) if values else None

@ tables.py: test_tables::tables_6_to_8
- "samples_7b": entry_7b["samples"],
+ "samples_7b": entry["samples"],

@ tables.py: test_tables::tables_6_to_8
- sums["all"][size] += pairs
+ sums["all"][size] = pairs

@ tables.py: test_tables::tables_6_to_8
- if (kind_of(row) == "UVRD") == synthesised:
+ if kind_of(row) == "UVRD":

@ tables.py: test_wiring::tables_show_ones
- row["Tables 6+7, 7B"] = sums[kind]["7B"]
+ row["Tables 6+7, 7B"] = sums[kind]["3B"]

@ tables.py: test_wiring::tables_show_ones
- row[result["model"]] = training.get(setting)
+ row[result["model"]] = None

@ tables.py: test_wiring::tables_show_ones
- row = {"model": result["model"], "full_name": checkpoint, "parameters": count}
+ row = {"model": result["model"], "full_name": checkpoint, "parameters": None}

@ tables.py: test_wiring::tables_show_ones
- return {"AVG-D": result["AVG-D"], "AVG-A": result["AVG-A"], **result["abilities"]}
+ return {"AVG-D": result["AVG-A"], "AVG-A": result["AVG-D"], **result["abilities"]}

@ tables.py: test_wiring::tables_show_ones
- row = {"model": model, "AVG-D": paper["table1"][model]["AVG"], "AVG-A": cells["AVG"]}
+ row = {"model": model, "AVG-D": cells["AVG"], "AVG-A": cells["AVG"]}

@ tables.py: test_tables::score_tables_and_curves
- scores = {score: y[model][i] for score, y in block["values"].items()}
+ scores = {score: y[GVE[0]][i] for score, y in block["values"].items()}

@ tables.py: test_wiring::tables_show_ones
- owner = "yours" if curve.setting == "pairs" else protocol["checkpoint"]
+ owner = protocol["checkpoint"]

@ tables.py: test_wiring::tables_show_ones
- if curve.setting == "pairs" and len(known) > 1:
+ if len(known) > 1:

@ tables.py: test_tables::correlations_equal
- return smaller + equal / 2
+ return smaller

@ tables.py: test_wiring::correlations_with
- shown_pearson = max(pearson(x, average), 0.03)
+ shown_pearson = pearson(x, average)

@ tables.py: test_wiring::correlations_with
- a, b = (pair, "AVG-A") if name == "Figure 8" else pair.split("-")
+ a, b = (pair, "AVG-D") if name == "Figure 8" else pair.split("-")

@ tables.py: test_wiring::pictures_show
- values = [row[ability] or 0 for ability in corners]
+ values = [row[ability] or 0 for ability in uvrb.ABILITIES]

@ tables.py: test_wiring::pictures_show
- ys = [row[x] for x in xs]
+ ys = [row[xs[0]] for x in xs]

@ tables.py: test_wiring::pictures_show
- grid[a, b] = value
+ grid[b, a] = value

@ tables.py: test_wiring::pictures_show
- heights = [row[family] or 0 for row in rows]
+ heights = [row[families[0]] or 0 for row in rows]

@ tables.py: test_wiring::pictures_show
- picture.suptitle(title)
+ picture.suptitle(name)

@ tables.py: test_wiring::the_paper_s_gains
- yield from check_gains(paper)
+ pass

@ tables.py: test_tables::any_cell
- yield Check("Table 1", model, "AVG", cells["AVG"], means["AVG-D"])
+ yield Check("Table 1", model, "AVG", cells["AVG"], cells["AVG"])

@ tables.py: test_tables::any_cell
- yield Check(where, row, name, cells[name], computed)
+ yield Check(where, row, name, cells[name], cells[name])

@ tables.py: test_tables::any_cell
- yield Check("Table 3", model, name, printed, same[name], tolerance=1e-9)
+ yield Check("Table 3", model, name, printed, same[name], tolerance=1)

@ tables.py: test_wiring::the_paper_s_gains
- computed = sum(own)
+ computed = printed

@ tables.py: test_wiring::the_paper_s_gains
- yield Check(where, label, score, y[model][the_model], computed)
+ yield Check(where, label, score, y[model][the_model], y[model][the_model])

@ tables.py: test_wiring::the_paper_s_gains
- yield Check("section 5.2", label, column, printed[kind], gain)
+ yield Check("section 5.2", label, column, printed[kind], printed[kind])

@ tables.py: test_wiring::the_paper_s_gains
- yield Check("text", f"{where}, {row}", name, claimed, shown, tolerance=0.0101)
+ yield Check("text", f"{where}, {row}", name, claimed, shown, tolerance=1)

@ tables.py: test_wiring::the_paper_s_gains
- return table_6_or_7(name, paper)
+ return table_6_or_7("Table 6", paper)

@ tables.py: test_tables::every_table
- for style in STYLES:
- text = render(caption, table.groups(), style)
+ for style in STYLES:
+     text = render(caption, table.groups())

@ tables.py: test_tables::score_tables_show
- caption = "\n".join([title, *notes(results), *table.footnotes])
+ pass

@ tables.py: test_tables::published_errata
- row[name] += "!"
+ pass

@ kernels/infonce.py: test_infonce::twin_equals
- return cls(top, (rests + (tops - top) * scale).logsumexp(0))
+ return cls(top, (rests + (tops - top)).logsumexp(0))

@ kernels/infonce.py: test_infonce::twin_equals
- return cls(scale.new_full((n,), LOWEST), scale.new_full((n,), -torch.inf))
+ return cls(scale.new_full((n,), 0.0), scale.new_full((n,), 0.0))

@ kernels/infonce.py: test_infonce::twin_equals
- rests = torch.stack([self.rest, other.rest])
+ rests = torch.stack([other.rest, self.rest])

@ kernels/infonce.py: test_infonce::twin_equals
- self.top[where] = merged.top
+ pass

@ kernels/infonce.py: test_infonce::twin_equals
- return (self.top - cosines) * scale + self.rest
+ return (self.top - cosines) * scale

@ kernels/infonce.py: test_infonce::twin_equals
- return LogSum(self.top[where], self.rest[where])
+ return LogSum(self.top[where], self.rest)

@ kernels/infonce.py: test_infonce::twin_equals
- return Weights(self.row[rows], self.positive[rows], self.column[columns])
+ return Weights(self.row[rows], self.positive[rows], self.column[rows])

@ kernels/infonce.py: test_infonce::interpreter_passes
- row_top = higher
+ pass

@ kernels/infonce.py: test_infonce::interpreter_passes
- grad = tl.where(dropped, 0.0, grad)
+ pass

@ kernels/bench.py: test_bench::the_table_has
- return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
+ return F.cross_entropy(logits, target)

@ kernels/bench.py: test_bench::the_table_has
- return info_nce(q, d, SCALE, impl=impl, **options)
+ return info_nce(q, d, 1, impl=impl, **options)

@ kernels/bench.py: test_bench::the_table_has
- return info_nce_ref(q, d, SCALE, **options)
+ return info_nce_ref(q, d, SCALE)

@ kernels/bench.py: test_bench::the_table_has
- methods = [m for m in methods if m.is_named(flags.methods)]
+ pass

@ kernels/bench.py: test_bench::rates_and
- return bool(ours and others) and min(ours) < min(others)
+ return bool(ours and others) and min(ours) > min(others)

@ kernels/bench.py: test_bench::rates_and
- rate = 8 * self.size**2 * self.dim / self.seconds  # four units of 2 N M D
+ rate = 2 * self.size**2 * self.dim / self.seconds

@ kernels/bench.py: test_bench::the_table_has
- for dim, size in itertools.product(flags.dims, flags.sizes):
+ for dim, size in itertools.product(flags.dims, flags.sizes[:1]):

@ kernels/bench.py: test_bench::half_inputs
- batch = random_batch(size, dim, DTYPES[flags.dtype])
+ batch = random_batch(size, dim, torch.float32)

@ kernels/bench.py: test_bench::the_table_has
- for turn in range(1 + repeats):
+ for turn in range(2):

@ kernels/bench.py: test_bench::the_table_has
- q.grad = None
+ pass

@ kernels/bench.py: test_bench::a_slow_method
- ahead = min(ahead, 1)  # most of the first run may be compilation
+ pass

@ kernels/bench.py: test_bench::every_mask
- d[5::8] += 3 * q[4:-1:8]
+ pass

@ kernels/bench.py: test_bench::the_exact_slices
- dropped |= q_ids[rows, None] == q_ids[columns]
+ pass

@ kernels/bench.py: test_bench::the_exact_slices
- p = (p + (z - column_lse[columns]).exp()) / 2
+ pass

@ kernels/bench.py: test_bench::the_exact_slices
- dd += gradient(others, first).T @ q[others].double()
+ dd = gradient(others, first).T @ q[others].double()

# extras/baselines_mllm.py: the baselines on language models

@ extras/baselines_mllm.py: test_baselines_mllm::a_dora_adapter
- backbone = load_adapter(backbone, path, False).merge_and_unload()
+ backbone = load_adapter(backbone, path, False).unload()

@ extras/baselines_mllm.py: test_baselines_mllm::qwen2vl_equals_transformers
- gve = GVE(backbone, processor, spec, base=base, positions=row.positions).eval()
+ gve = GVE(backbone, processor, spec, base=base).eval()

@ extras/baselines_mllm.py: test_baselines_mllm::llava_next_equals
- features = states[core.config.vision_feature_layer][:, 1:]  # (n, P, C), no class token
+ features = states[-1][:, 1:]

@ extras/baselines_mllm.py: test_baselines_mllm::unime_equals
- return [torch.cat([features, core.image_newline[None]])]
+ return [torch.cat([features, features[-1:]])]

@ extras/baselines_mllm.py: test_baselines_mllm::a_video_is_never
- if len(frames) != model.row.frames:
+ if len(frames) < 1:

@ extras/baselines_mllm.py: test_baselines_mllm::frames_become_pixels
- mean = torch.tensor(processor.image_mean)[:, None, None]
+ mean = torch.tensor(processor.image_mean).flip(0)[:, None, None] + 0.01

@ extras/baselines_mllm.py: test_baselines_mllm::a_long_text
- kept = bisect.bisect_right(range(len(turn.text)), limit, key=count_tokens) - 1
+ kept = bisect.bisect_right(range(len(turn.text)), limit, key=count_tokens)

# support/flops.py: what a step costs

@ support/flops.py: test_flops::a_forward_pass_alone
- per_channel = 12 if backward else 4
+ per_channel = 12

@ support/flops.py: test_flops::a_forward_pass_alone
- if backward and weight.requires_grad:
+ if weight.requires_grad:

@ support/flops.py: test_flops::trained_weights_cost
- if backward and weight.requires_grad:
+ if backward and not weight.requires_grad:

# support/media.py: what a player shows, and when

@ support/media.py: test_media::windows_of_a_variable
- stop = int(np.searchsorted(self.times, end - ROUNDING, side="left"))
+ stop = n

@ support/media.py: test_media::windows_that_meet
- return int(np.searchsorted(self.times, time + ROUNDING, side="right")) - 1
+ return int(np.searchsorted(self.times, time, side="right")) - 1

@ support/media.py: test_media::a_slide
- return first, stop, float(end - start)
+ return first, stop, float(end - self.times[first])

@ support/media.py: test_media::timestamps_that_start
- if np.abs(ordered - stamps).max() > MISPLACED:
+ if False:

@ support/media.py: test_media::milliseconds
- follows = np.abs(times - even).max() <= tolerance
+ follows = np.abs(times - even).max() <= 1e-9

@ support/media.py: test_media::a_cut_with
- if not packet.is_discard:
+ if True:

@ support/media.py: test_media::jumps_give
- last = first - 1
+ last = first

@ support/media.py: test_media::a_file_cut
- return f"{path}: damaged: {n} of {whole} frames decode" if n < whole else ""
+ return ""

@ support/media.py: test_media::pixels_that
- self.aspect = float(stream.sample_aspect_ratio or 1)
+ self.aspect = 1.0

@ support/media.py: test_media::mirrors
- mirrored_x, mirrored_y = a < 0, d < 0
+ mirrored_x, mirrored_y = d < 0, a < 0

@ support/media.py: test_media::transparent_parts_of_a_video
- pixels = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
+ pixels = (pixels[..., :3] * alpha).round().astype(np.uint8)

@ support/media.py: test_media::frames_in_a_folder
- return sorted(names, key=numeric)
+ return sorted(names)

@ support/media.py: test_media::frames_in_a_folder
- if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
+ if Path(name).suffix.lower() in IMAGE_SUFFIXES:

@ support/media.py: test_media::images_stand
- return ImageOps.exif_transpose(image)
+ return image

@ support/media.py: test_media::transparent_parts_of_an_image
- white = Image.new("RGBA", image.size, "white")
+ white = Image.new("RGBA", image.size, "black")

@ support/media.py: test_media::deep_images
- least, most = 0, 65535
+ least, most = 0, 255

@ support/media.py: test_media::numbers_that
- if not 0 <= value <= sys.float_info.max:
+ if value < 0:

@ support/media.py: test_media::damaged_images
- except Exception as error:
- raise MediaError(f"{image}: not a readable image ({error})") from error
+ except OSError as error:
+     raise MediaError(f"{image}: not a readable image ({error})") from error

# One query with several right answers; equal rows

@ train.py: test_wiring::a_run_is_the_loop
- q_ids = batch.query.ids.to(device)
+ q_ids = None

@ train.py: test_wiring::a_run_is_the_loop
- q_ids=q_ids,
- tau=tau,
+ tau=tau,

@ train.py: test_wiring::a_run_with_every_setting
- q_ids=q_ids,
- margin=margin,
- symmetric=flags.symmetric,
+ margin=margin,
+ symmetric=flags.symmetric,

@ train.py: test_wiring::train_hands_on
- **curve_sums(q, p, n, p_ids, n_ids, q_ids),
+ **curve_sums(q, p, n, p_ids, n_ids),

@ train.py: test_wiring::a_run_is_the_loop
- drop[:, : len(all_q)] |= all_q_ids[own][:, None] == all_q_ids
+ pass

@ train.py: test_wiring::a_run_is_the_loop
- drop |= all_q_ids[own][:, None] == all_q_ids
+ pass

@ train.py: test_loss::shares_and_gradients
- all_q_ids = number_rows(all_q) if q_ids is None else gather_rows(q_ids)
+ all_q_ids = gather_rows(number_rows(q) if q_ids is None else torch.arange(len(q)))

@ train.py: test_wiring::a_run_with_every_setting
- found = mine(q.to(device), p.to(device), ids, source.negatives, margin, q_ids=q_ids)
+ found = mine(q.to(device), p.to(device), ids, source.negatives, margin)

@ kernels/infonce.py: test_infonce::twin_equals
- dropped.logical_or_(masks.query_id[:, None] == masks.asker_id)
+ pass

@ kernels/infonce.py: test_infonce::twin_equals
- column = target.where(target >= 0, M)  # ignored rows write past the end
+ column = target.clamp(min=0)

@ kernels/infonce.py: test_infonce::twin_equals
- of_columns = [x[columns] for x in self[3:]]
+ of_columns = [x[rows] for x in self[3:]]

@ embed.py: test_ties::top_k_ranks
- rank_equal_rows(scores, indices, find_first_equals(corpus, torch.cat(looks)))
+ pass

@ embed.py: test_ties::rows_are_equal
- values = as_tensor(rows).float().cpu() + 0  # -0 + 0 = 0
+ values = as_tensor(rows).float().cpu()

@ embed.py: test_ties::rows_are_equal
- hashes.append(hash_rows(corpus[some.numpy()]))
+ hashes.append(hash_some_columns(corpus[some.numpy()]))

@ embed.py: test_wiring::equal_values
- first = torch.empty_like(places).scatter_reduce_(0, number, places, "amin", include_self=False)
+ first = torch.empty_like(places).scatter_reduce_(0, number, places, "amax", include_self=False)

@ eval.py: test_ties::ranks_put
- scores[:, repeats] = scores[:, first[repeats]]
+ pass

# Resuming, and data that no run can use

@ train.py: test_checkpoint::resuming_with
- check_settings(out, resumed["config"], config)
+ pass

@ train.py: test_wiring::a_run_resumes
- check_data(out, resumed.get("data", {}), data_facts)
+ pass

@ train.py: test_wiring::a_run_resumes
- if base_hash != resumed.get("base_hash"):
+ if False:

@ support/checkpoint.py: test_wiring::a_run_that_stops
- "preset",  # only gives other flags their defaults, and they are compared
+ *("preset", "lr"),

@ support/checkpoint.py: test_checkpoint::data_that_changed
- if not changes and list(before) != list(after):
+ if False:

@ support/checkpoint.py: test_checkpoint::ranks_that_see
- if (step, digest) != (first_step, first_digest):
+ if False:

@ train.py: test_checkpoint::a_second_run
- if rank == 0 and not stack.enter_context(file_lock(lock, wait=False)):
+ if False:

@ train.py: test_train::a_source_whose
- if reason and not look.hard_negatives:
+ if False:

@ train.py: test_train::media_outside
- if len(look.outside) > 0.9 * look.rows:
+ if False:

@ data.py: test_data::content_is_the_same
- text = unicodedata.normalize("NFC", item.get("text") or "")
+ text = item.get("text") or ""

@ data.py: test_data::other_content
- content.append([media[path_key], span])
+ content.append([media[path_key]])

@ data.py: test_wiring::a_run_resumes
- "hash": self.hash,
+ "hash": len(self),

# Checkpoints: least tokens, positions, bases

@ model.py: test_model::min_tokens_and_positions, test_model::a_checkpoint_is_loaded
- settings[name] = given[name] or saved.get(name, settings[name])
+ settings[name] = given[name] or settings[name]

@ model.py: test_model::min_tokens_and_positions
- settings[name] = given[name] or saved.get(name, settings[name])
+ settings[name] = saved.get(name, settings[name])

@ model.py: test_model::min_tokens_and_positions
- "min_tokens": MIN_TOKENS if saved else RELEASED_MIN_TOKENS,
+ "min_tokens": MIN_TOKENS,

@ model.py: test_model::min_tokens_and_positions
- settings = choose_settings(given, info or read_info(full), path)
+ settings = choose_settings(given, info, path)

@ model.py: test_model::1d_positions
- if self.positions == "1d":
+ if False:

@ model.py: test_wiring::a_clip_has
- min_tokens=self.min_tokens,
- prompt_style=self.prompt_style,
+ prompt_style=self.prompt_style,

@ model.py: test_embed::the_commands_prompt
- prompt_style=self.prompt_style,
- timed_grids=self.spec.timed_grids,
+ timed_grids=self.spec.timed_grids,

@ model.py: test_model::an_adapter_on
- if wrong_base and not base:
+ if False:

@ model.py: test_embed::batches_hold
- is_full = width * (len(batch) + 1) > batch_tokens or len(batch) == batch_size
+ is_full = width * len(batch) > batch_tokens or len(batch) == batch_size

@ model.py: test_wiring::a_clip_has
- tally[sample["decoder"]] += 1
+ tally[sample["decoder"]] = 1

@ data.py: test_model::small_frames
- "shortest_edge": self.min_tokens[kind] * pixels_per_token * counted,
+ "shortest_edge": 4 * pixels_per_token,

@ data.py: test_model::stored_features
- protocol = [self.frames, self.min_tokens, self.max_tokens, self.settings]
+ protocol = [self.frames, self.max_tokens, self.settings]

@ embed.py: test_wiring::embed_hands
- base=flags.base,
+ base="",

@ embed.py: test_wiring::embed_hands
- min_tokens=flags.min_tokens,
+ min_tokens=0,

@ embed.py: test_wiring::embed_hands
- positions=flags.positions,
+ positions="",

@ eval.py: test_wiring::eval_hands
- "min_tokens": gve.min_tokens,
+ "min_tokens": 4,

@ train.py: test_wiring::train_hands_on
- min_tokens=flags.min_tokens,
+ min_tokens=0,

@ train.py: test_wiring::train_hands_on
- positions=flags.positions,
+ positions="",

# Somebody's encoder, somebody's clips, somebody's server

@ eval.py: test_eval::an_encoders_file
- sys.path.insert(0, str(path.parent))
- sys.argv = [str(path)]
+ sys.argv = [str(path)]

@ eval.py: test_eval::an_encoders_file
- sys.modules["__mp_main__"] = module
+ pass

@ eval.py: test_eval::an_encoder_with_frames
- decoded["image"] = decoded["image"][0]
+ pass

@ eval.py: test_eval::prepare_runs
- workers=workers if function.frames else 0,
+ workers=0,

@ eval.py: test_eval::the_settings_alone
- "size": function.size,
+ "size": None,

@ eval.py: test_eval::results_json_holds_what
- return protocol | (function.protocol or {})
+ return protocol

@ eval.py: test_eval::a_clip_that_hangs
- return vectors, *say_where(rows, reasons, tally)
+ return vectors, *say_where(rows, reasons, {})

@ embed.py: test_eval::vectors_with_a_fingerprint
- dim = dim or agree_on_dim(cache.find_dim())
+ dim = dim or 0

@ eval.py: test_eval::an_encoder_may
- if isinstance(result, list | tuple):
+ if isinstance(result, tuple):

@ eval.py: test_eval::a_wrong_result
- zeros = (vectors == 0).all(1).nonzero().flatten().tolist()
+ zeros = []

@ eval.py: test_eval::vectors_that_are_all
- return count > 1
+ return False

@ support/files.py: test_embed::a_folder_s_media
- folders[:] = sorted(name for name in folders if not name.startswith("."))
+ pass

@ embed.py: test_embed::a_folder_s_media
- return len(failed)
+ return 0

@ caption.py: test_synth::one_rule
- answer = THINKING_ENDS.split(whole_characters(answer))[-1].strip()
+ answer = whole_characters(answer).strip()

@ caption.py: test_synth::one_rule
- if end == "content_filter":
+ if False:

@ caption.py: test_synth::one_rule
- if set(names) <= value.keys():
+ if set(names) == value.keys():

@ caption.py: test_synth::texts_that_go
- if equal == 3 * size:
+ if equal == 30 * size:

@ caption.py: test_synth::texts_that_go
- return 5 * doubled > len(words) or bool(re.search(r"(\S)\1{9}", text))
+ return 50 * doubled > len(words) or bool(re.search(r"(\S)\1{9}", text))

@ caption.py: test_synth::one_rule
- if THINKING_STARTS.search(answer):
+ if False:

@ caption.py: test_synth::one_rule
- text = ", ".join(text)  # keywords
+ pass

@ caption.py: test_synth::one_rule
- if message.get("refusal"):
+ if False:

@ caption.py: test_synth::json_mode
- self.has_json_mode = False
+ pass

@ caption.py: test_synth::retry_after
- return min(max(wait, 0.0), LONGEST_WAIT)
+ return max(wait, 0.0)

@ caption.py: test_synth::no_reply
- keys = [request_key(request, captioner) for request in requests]
+ keys = [request_key(request, "") + str(id(request)) for request in requests]

@ caption.py: test_synth::answers_stop
- limit = max_new_tokens or max(map(tokens_for, batch))
+ limit = max_new_tokens or 1024

@ caption.py: test_synth::every_way
- if answers[i].fate == "dropped" and reply.end != "length":
+ if False:

@ caption.py: test_synth::every_way
- for key in ("prompt_tokens", "completion_tokens"):
+ for key in ("completion_tokens", "prompt_tokens"):

@ caption.py: test_synth::every_way
- if status not in (408, 409, 429) and status < 500:
+ if status < 500:

@ synth.py: test_wiring::synth_hands
- max_new_tokens=flags.max_new_tokens or None,
+ max_new_tokens=None,

@ synth.py: test_synth::pairs_that_are
- lines.setdefault(pair, {key: relative_media(row[key], folder) for key in keys})
+ lines[len(lines)] = {key: relative_media(row[key], folder) for key in keys}

@ caption.py: test_synth::one_rule
- return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
+ return text

@ caption.py: test_synth::one_rule
- return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", whole_characters(text)).split())
+ return text.strip()

@ caption.py: test_synth::no_reply
- asked = json.dumps([captioner, request["media"], request["prompt"]])
+ asked = json.dumps([captioner, request["media"]])

@ caption.py: test_synth::answers_stop
- return sum(2 * most + 16 for _, most in request["want"].values())
+ return 2 * sum(2 * most + 16 for _, most in request["want"].values())

@ caption.py: test_synth::answers_stop
- is_long = output.shape[1] == max_new_tokens
+ is_long = False

@ caption.py: test_wiring::captioner_media
- "fps": n / video.seconds,
+ "fps": 24.0,

@ caption.py: test_synth::json_mode
- "required": names,
+ "required": [],

@ caption.py: test_synth::one_rule
- elif part.get("type") in ("text", "output_text", "refusal", None):  # not "thinking"
+ elif part.get("type"):

@ data.py: test_wiring::paths_may_be
- plain[kind] = os.fspath(media)
+ pass

@ data.py: test_wiring::paths_may_be
- plain[kind] = media | {path_key: os.fspath(media[path_key])}
+ pass

@ embed.py: test_wiring::paths_may_be
- return "video" in item, "image" in item, len(item.get("text") or "")
+ return len(item.get("text") or "")

@ embed.py: test_ties::top_k_ranks
- equal = members[start : start + min(copies[group], k)]
+ equal = members[start : start + 1]

@ embed.py: test_wiring::embed_hands
- labels.append({"id": row.get("id", str(len(rows))), "line": number})
+ labels.append({"id": row.get("id", str(number)), "line": number})

@ embed.py: test_embed::command_writes
- last = f"{out}: {n - len(failed)} of {n} items embedded, dim {dim}"
+ last = f"{out}: {n} of {n} items embedded, dim {dim}"

@ eval.py: test_eval::a_wrong_encoder
- if path and not os.path.exists(path):
+ if False:

@ model.py: test_wiring::gve_json
- with whole_folder(folder) as staging:
+ with whole_folder(str(folder) + "-") as staging:

@ model.py: test_model::min_tokens_and_positions
- "min_tokens": self.min_tokens,
+ "min_tokens": 4,

@ model.py: test_model::a_path_without
- return path.count("/") == 1 and not path.startswith((".", "/"))
+ return path.count("/") >= 1

@ model.py: test_model::a_checkpoint_is_loaded
- if file is None:
- return {}
+ if True:
+     return {}

@ model.py: test_model::unknown_positions
- if value not in accepted:
+ if False:

@ model.py: test_model::an_adapter_on
- if info.get("base_fingerprint") in (None, backbone.fingerprint):
+ if True:

@ model.py: test_model::a_fingerprint
- digest.update(some.view(torch.uint8).numpy())
+ pass

@ synth.py: test_wiring::synth_hands
- return {source["task"]: source for source in mixture if source["name"].startswith("UVRD-")}
+ return {source["task"]: source for source in mixture}

@ synth.py: test_synth::names_and_captions
- if row["video"] != video:
+ if False:

@ synth.py: test_synth::names_and_captions
- return name.encode("utf-8", "backslashreplace").decode()
+ return name

@ synth.py: test_wiring::synth_hands
- return keep_replies(ask, path, f"{flags.captioner} {flags.max_new_tokens}")
+ return keep_replies(ask, path, flags.captioner)

@ synth.py: test_wiring::synth_hands
- if reasons & {"static", "consistency", "duplicate"}:
+ if True:

@ tables.py: test_wiring::eval_shows
- if absent:
- raise ValueError(f"{path}: no results.json of eval.py: it has no {', '.join(absent)}")
+ if False:
+     raise ValueError(f"{path}: no results.json of eval.py: it has no {', '.join(absent)}")

@ tables.py: test_wiring::small_helpers
- if column != "model" and any(row.get(column) is not None for row in rows):
+ if column != "model":

@ tables.py: test_wiring::tables_show_ones
- return [name for name in names if build(name, paper, results, None, ()).rows_of_results()]
+ return list(names)

@ tables.py: test_eval::a_folders_own_dataset
- return name in ("Table 1", "Table 11") and not several and "AVG" not in table.yours[0]
+ return False

@ train.py: test_wiring::small_helpers
- return q.detach().unique(dim=0, return_inverse=True)[1]
+ return torch.arange(len(q))

@ train.py: test_wiring::a_run_with_every_setting
- answers[of_row, torch.searchsorted(contents, ids[known])] = True
+ pass

@ train.py: test_wiring::a_run_that_stops
- return self.file.tell() if self.file else 0
+ return 0

@ uvrb.py: test_uvrb::a_folder_that_is_not
- names = [name for name in known if folder_of(root, name)]
+ names = list(known)

@ uvrb.py: test_wiring::small_helpers
- entry[key] = len(file.read_bytes().splitlines()) if file.is_file() else 0
+ entry[key] = 0

@ uvrb.py: test_uvrb::a_videos_folder
- if len(self.outside) > 1:
+ if False:

@ uvrb.py: test_uvrb::check_lists
- for line in first_few(lines, show, f"more like these (--show {len(lines)} lists them)"):
+ for line in lines:

# Two devices: tensors that stay on the CPU

@ train.py: test_devices::grad_cache
- self.generator = torch.cuda.default_generators[empty.device.index]
+ self.generator = torch.cuda.default_generators[0]

@ train.py: test_devices::training
- q_ids = batch.query.ids.to(device)
+ q_ids = batch.query.ids

@ train.py: test_devices::losses
- first = order[new].to(p.device)  # (U,) the first row of each content
+ first = order[new]

@ model.py: test_devices::encoding
- features = torch.cat([media.to(embeds) for media in batch[f"{kind}_features"]])  # (V, D)
+ features = torch.cat([media for media in batch[f"{kind}_features"]])

@ model.py: test_devices::encoding
- return self(to_device(inputs, self.device)).float().cpu()
+ return self(to_device(inputs, self.device)).float()

@ kernels/windows.py: test_devices::encoding
- offsets = torch.arange(n, device=query.device)
+ offsets = torch.arange(n)

# extras/baselines.py: the baselines of two towers

@ extras/baselines.py: test_baselines::viclip_equals
- time = time.mean(1, keepdim=True)  # an image
+ time = time[:, :1]

@ extras/baselines.py: test_baselines::languagebind_equals
- x = x + self.temporal_embedding  # which stays in the residual stream
+ pass

@ extras/baselines.py: test_baselines::internvideo2_equals
- return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads))
+ return self.proj(attend(q, k, v, self.heads))

@ extras/baselines.py: test_baselines::videoclip_xl
- merged[:KEPT_POSITIONS] = tensors[name][:KEPT_POSITIONS]
+ pass

@ extras/baselines.py: test_baselines::clip4clip_is
- return F.normalize(frames, dim=-1).unflatten(0, pixels.shape[:2]).mean(1)
+ return frames.unflatten(0, pixels.shape[:2]).mean(1)

@ extras/baselines.py: test_baselines::frames_are
- pixels = F.interpolate(pixels, shape, mode=mode, align_corners=False, antialias=False)
+ pixels = F.interpolate(pixels, shape, mode=mode, align_corners=False, antialias=True)

@ extras/baselines.py: test_baselines::texts_are
- ids = ids[: limit - 1] + ids[-1:]
+ ids = ids[:limit]

@ extras/baselines.py: test_baselines::a_missing
- if name not in used and not re.fullmatch(unused, name):
+ if False:

"""


class Mutant(NamedTuple):
    """One fault. Lines are compared without their indentation."""

    file: str
    old: list  # lines
    new: list  # lines, indented relative to the first
    tests: list  # of (test file, beginning of a test's name)

    @property
    def name(self):
        return f"{self.file} {function_at(self)}: {self.new[0].strip()}"


def read_list(text):
    """Read LIST -> [Mutant]."""
    mutants = []
    for line in text.splitlines():
        sign, _, rest = line.partition(" ")
        if sign == "@":
            file, _, tests = rest.partition(": ")
            pairs = [tuple(test.split("::")) for test in tests.split(", ")]
            mutants.append(Mutant(file, [], [], [(f"{name}.py", test) for name, test in pairs]))
        elif sign == "-":
            mutants[-1].old.append(rest.strip())
        elif sign == "+":
            mutants[-1].new.append(rest)
        elif sign not in ("", "#"):
            raise ValueError(f"mutants.py: neither @, -, + nor #: {line!r}")
    return mutants


MUTANTS = read_list(LIST)


def places_of(mutant, root=ROOT):
    """Return the numbers of the lines at which a mutant's old lines stand, from 0."""
    lines = [line.strip() for line in (root / mutant.file).read_text().splitlines()]
    n = len(mutant.old)
    return [i for i in range(len(lines)) if lines[i : i + n] == mutant.old]


def function_at(mutant):
    """Return the name of the function that a mutant is in, "" outside of any."""
    place = places_of(mutant)[0] + 1
    for name, node in functions_of(mutant.file):
        if node.lineno <= place <= node.end_lineno:
            return name
    return ""


def functions_of(file):
    """List (name, node) of a file's functions and methods; inner ones belong to the outer."""
    found = []

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                found.append((prefix + child.name, child))
            elif isinstance(child, ast.ClassDef):
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse((ROOT / file).read_text()), "")
    return found


def test_ids(mutant, root=ROOT):
    """Return the full ids of a mutant's tests. Raises ValueError if one is not there."""
    ids = []
    for file, beginning in mutant.tests:
        text = (root / "tests" / file).read_text()
        names = re.findall(rf"^def (test_{beginning}\w*)\(", text, re.MULTILINE)
        if not names:
            raise ValueError(f"{mutant.name}: {file} has no test_{beginning}...")
        ids += [f"tests/{file}::{name}" for name in names]
    return ids


def faults_of_the_list():
    """Return what is wrong with the list: lines that no longer stand, tests that are not there."""
    wrong = []
    for mutant in MUTANTS:
        times = len(places_of(mutant))
        if times != 1:
            wrong.append(f"{mutant.file}: stands {times} times: {' / '.join(mutant.old)}")
            continue
        try:
            test_ids(mutant)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def functions_without_mutant():
    """List the public functions of the root and of kernels/ in which nothing is broken."""
    broken = {(m.file, function_at(m)) for m in MUTANTS}
    idle = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]):
        file = str(path.relative_to(ROOT))
        for name, _ in functions_of(file):
            public = not any(part.startswith("_") for part in name.split("."))
            if public and (file, name) not in broken:
                idle.append(f"{file} {name}")
    return idle


# The runner: a process with torch and transformers forks one child per mutant, which imports the
# repository's copy. A fresh Python for each would take eight seconds to import them.


def copy_repository(folder):
    """Copy what the tests need; no Python caches, which are told apart by time and size alone."""
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def start(ids, root, output):
    """Run tests in a forked child, in a process group of its own -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(root)
        sys.path[0] = str(root / "tests")
        sys.dont_write_bytecode = True
        import pytest

        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *ids])
    finally:
        os._exit(int(status))


def finish(pid, seconds):
    """Wait for a child -> its exit status, None if it took too long; its processes are ended."""
    until = time.monotonic() + seconds
    status = None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.02)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(pid, 0)
    return status


def try_mutant(mutant, root):
    """Break the line in a copy, run its tests, mend it -> (verdict, seconds, output)."""
    path = root / mutant.file
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    (place,) = places_of(mutant, root)
    old = lines[place]
    indent = old[: len(old) - len(old.lstrip())]
    lines[place : place + len(mutant.old)] = [f"{indent}{line}\n" for line in mutant.new]
    output = root.with_suffix(".out")
    began = time.monotonic()
    try:
        path.write_text("".join(lines))
        status = finish(start(test_ids(mutant), root, output), LIMIT)
    finally:
        path.write_text(whole)
    verdict = {0: "MISSED", 1: "caught", None: "TOO LONG"}.get(status, f"ERROR {status}")
    return verdict, time.monotonic() - began, output.read_text(errors="replace")


def preload():
    """Import what the tests import, outside of this repository."""
    import av  # noqa: F401
    import httpx  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor  # noqa: F401

    torch.set_num_threads(1)


def work(mutants, first, step, folder, report):
    """Try every step-th mutant in a copy of one's own; report a line for each."""
    root = copy_repository(folder / f"copy-{first}")
    failed = 0
    for mutant in mutants[first::step]:
        verdict, seconds, output = try_mutant(mutant, root)
        report(f"{verdict:8} {seconds:5.1f} s  {mutant.name}")
        if verdict != "caught":
            failed += 1
            report("    - " + "\n    - ".join(mutant.old) + f"\n    {mutant.tests}")
            if verdict != "MISSED":
                report(output[-1500:])
    return failed


def check_unbroken(mutants, folder):
    """Run the mutants' tests over the whole lines: one that fails by itself would catch all."""
    began = time.monotonic()
    output = folder / "whole.out"
    ids = sorted({test for mutant in mutants for test in test_ids(mutant)})
    status = finish(start(ids, copy_repository(folder / "whole"), output), 3600)
    if status != 0:
        sys.exit(output.read_text()[-4000:] + "\nthese fail without a fault")
    return f"{len(ids)} tests pass without a fault, {time.monotonic() - began:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests unbroken")
    parser.add_argument("--functions", action="store_true", help="list functions without a mutant")
    flags = parser.parse_args()
    if flags.functions:
        print("\n".join(functions_without_mutant()))
        return
    wrong = faults_of_the_list()
    if wrong:
        sys.exit("\n".join(wrong))

    mutants = [mutant for mutant in MUTANTS if flags.only in mutant.name]
    began = time.monotonic()
    preload()

    def report(text):
        print(text, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not flags.no_check:
            report(check_unbroken(mutants, folder))

        children = []
        for first in range(flags.jobs):
            pid = os.fork()
            if not pid:
                failed = 99
                try:
                    failed = work(mutants, first, flags.jobs, folder, report)
                finally:
                    os._exit(min(failed, 99))
            children.append(pid)
        failed = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    seconds = time.monotonic() - began
    report(f"{len(mutants) - failed} of {len(mutants)} faults caught, {seconds:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

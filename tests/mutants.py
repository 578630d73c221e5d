"""Deliberate faults, one after the other, in a copy of the checkout: each must make a test fail.

Source: mutation testing, DeMillo et al. (1978), "Hints on test data selection". A suite that passes on a
faulty program says little, so each fault here names the test files that must notice it.
Deviation: the faults are written by hand, because most of what a tool generates is equivalent or trivial.
The tests must pass without any fault, or a failure would show nothing: they are run first.

Run it: python tests/mutants.py                 (all of them, about ten minutes)
        python tests/mutants.py NAME ...        (some of them)
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "venv", "runs")  # of the copy
LONGEST = 300  # seconds of the tests of a fault; one that makes them hang is caught, too
FAILED = 1  # pytest's exit code when tests have failed


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file` the text `before`, which stands there once, becomes `after`."""

    name: str
    file: str
    before: str
    after: str
    tests: str  # files in tests/ that must notice it, separated by blanks


MUTANTS = (
    Mutant("triton-log-space-sign", "kernels/guidance.py", tests="test_kernel.py",
           before="mixed = g * low_pos + (1 - g) * low_neg",
           after="mixed = g * low_pos - (1 - g) * low_neg"),
    Mutant("triton-strict-mask", "kernels/guidance.py",
           "(log_pos >= bound) &", "(log_pos > bound) &", "test_kernel.py"),
    Mutant("triton-not-finite-in-the-negative-row", "kernels/guidance.py",
           "broken = broken | (lse_neg != lse_neg)", "broken = broken | False", "test_kernel.py"),
    Mutant("triton-bound-one-token-higher", "kernels/truncation.py",
           "tl.where(reached >= target, bins, 0)", "tl.where(reached > target, bins, 0)",
           "test_truncation.py"),
    Mutant("triton-digits-of-other-scores-count", "kernels/truncation.py",
           "counted &= (key >> 10) == (bound >> 10)", "counted &= weight > 0", "test_truncation.py"),
    Mutant("triton-top-p-forgets-top-k", "kernels/guidance.py", tests="test_truncation.py",
           before="if k > 0:\n                weight", after="if k < 0:\n                weight"),
    Mutant("triton-a-sweep-too-many", "kernels/guidance.py", tests="test_truncation.py",
           before="asked = (k > 0) if KIND == COUNT else (p < 1)", after="asked = True"),
    Mutant("head-kernel-without-temperature", "kernels/head.py", tests="test_head.py",
           before="z / tl.where(temp > 0, temp, 1.0) + noise", after="z + noise"),
    Mutant("head-kernel-draws-beyond-the-vocabulary", "kernels/head.py",
           "z = tl.where(token < V, z, MINUS_INF)", "z = tl.where(token < V, z, 0.0)", "test_head.py"),
    Mutant("head-kernel-does-not-round", "kernels/head.py", tests="test_head.py",
           before="z = z.to(weight.dtype.element_ty).to(tl.float32)", after="z = z + 0"),
    Mutant("head-kernel-serves-pairs", "kernels/head.py",
           "(sampling.guides or sampling.masks", "(sampling.masks or sampling.masks", "test_head.py"),
    Mutant("head-kernel-without-normaliser", "kernels/head.py",
           "SCORE_SUM, total, mask=filled)", "SCORE_SUM, 1.0, mask=filled)", "test_head.py"),
    Mutant("head-timed-for-any-number-of-rows", "cfgsafe/guidance.py",
           "model.config.vocab_size, *hidden.shape)", "model.config.vocab_size)", "test_head.py"),
    Mutant("head-kernel-despite-an-adapter", "cfgsafe/lora.py",
           "return None if in_use else", "return", "test_head.py"),
    Mutant("prob-space-g-plus-one", "kernels/reference.py",
           "mixed = g * log_pos.exp()", "mixed = (g + 1) * log_pos.exp()", "test_guidance.py"),
    Mutant("strict-mask", "kernels/reference.py", "log_pos >= bound", "log_pos > bound", "test_guidance.py"),
    Mutant("top-p-beyond-border", "kernels/reference.py",
           "(mass < top_p", "(mass <= top_p", "test_guidance.py"),
    Mutant("noise-ignores-step", "kernels/reference.py",
           "token[None, :], step[:, None])", "token[None, :], 0 * step[:, None])", "test_guidance.py"),
    Mutant("not-finite-counts-as-impossible", "kernels/reference.py",
           "values.isnan(), NOT_FINITE", "values.isnan(), IMPOSSIBLE", "test_kernel.py"),
    Mutant("log-zero-unfloored", "kernels/reference.py",
           "g * log_pos.clamp(min=FLOOR)", "g * log_pos", "test_guidance.py"),
    Mutant("infinite-options-are-taken", "cfgsafe/fields.py", tests="test_fields.py",
           before="not math.isfinite(value)", after="math.isnan(value)"),
    Mutant("the-options-of-an-endpoint-have-no-range", "cfgsafe/fields.py", tests="test_fields.py",
           before="            check_ranges(value, place)\n", after=""),
    Mutant("a-hard-link-is-another-file", "cfgsafe/outputs.py", tests="test_outputs.py",
           before="return os.path.samefile(path, other)",
           after="return os.path.realpath(path) == os.path.realpath(other)"),
    Mutant("an-input-in-the-folder-written-is-safe", "cfgsafe/outputs.py", tests="test_outputs.py",
           before="or lies_in(source, path)", after=""),
    Mutant("any-runtime-error-is-memory", "cfgsafe/cli.py",
           "and not NO_MEMORY.search(str(error))", "and False", "test_cli.py"),
    Mutant("a-full-disk-under-stdout-is-seen-too-late", "cfgsafe/cli.py", tests="test_cli.py",
           before="print(end=\"\", flush=True)  # here", after="print(end=\"\")  # here"),
    Mutant("options-without-effect-are-taken", "cfgsafe/cli.py",
           "if typed in given:", "if typed in given and False:", "test_unused.py"),
    Mutant("an-equals-sign-hides-an-option", "cfgsafe/cli.py",
           'word.partition("=")[0]', "word", "test_unused.py"),
    Mutant("distilled-slope-without-the-teacher", "cfgsafe/distillation.py", tests="test_distil.py",
           before="(log_q.exp_() - log_p.exp_())", after="log_q.exp_()"),
    Mutant("the-divergence-is-backwards", "cfgsafe/distillation.py", tests="test_distil.py",
           before="log_p.exp() * (log_p - log_q)", after="log_q.exp() * (log_q - log_p)"),
    Mutant("gaps-stay", "cfgsafe/decode.py", "            self._close_gaps()\n", "", "test_engine.py"),
    Mutant("a-moved-row-loses-a-slot", "cfgsafe/decode.py",
           "self.cache, row, length)", "self.cache, row, length - 1)", "test_engine.py"),
    Mutant("a-failed-batch-goes-on", "cfgsafe/decode.py", tests="test_engine_failures.py",
           before="            if not whole:\n                self.batch = None", after=""),
    Mutant("who-fails-together-fails", "cfgsafe/decode.py",
           "if len(states) == 1:", "for _ in states[:1]:", "test_engine_failures.py"),
    Mutant("answers-not-flushed", "cfgsafe/files.py", '"ab+", buffering=0)', '"ab+")', "test_scoring.py"),
    Mutant("half-a-row-stays-in-the-log", "cfgsafe/files.py",
           "self._file.truncate(end)", "pass", "test_files.py"),
    Mutant("old-folder-deleted-before-the-new-is-on-disk", "cfgsafe/folders.py",
           "sync(folder.parent)", "pass", "test_folders.py"),
    Mutant("a-live-process-is-cleared-away", "cfgsafe/folders.py",
           "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN", "test_folders.py"),
    Mutant("combine-swapped", "cfgsafe/guidance.py",
           "g * wide + (1 - g) *", "(1 - g) * wide + g *", "test_decode.py"),
    Mutant("weights-by-their-date", "cfgsafe/identity.py",
           'hashlib.file_digest(file, "sha256").hexdigest()', "str(state[2:4])", "test_identity.py"),
    Mutant("rope-unscaled", "cfgsafe/llama.py",
           "(1 - smooth) * frequency / factor", "(1 - smooth) * frequency", "test_llama.py"),
    Mutant("a-reused-row-keeps-its-end", "cfgsafe/llama.py",
           "mine[:, target, :, slots:] = 0", "pass", "test_engine_failures.py"),
    Mutant("mask-hides-itself", "cfgsafe/llama.py",
           "every <= positions", "every < positions", "test_decode.py"),
    Mutant("products-forget-the-bias", "cfgsafe/products.py", tests="test_products.py",
           before="return y if self.bias is None else y + self.bias", after="return y"),
    Mutant("products-hold-both-weights", "cfgsafe/products.py",
           "layer.weight.data = weight.new_empty(0)", "assert layer", "test_products.py"),
    Mutant("products-without-a-margin", "cfgsafe/products.py",
           "CLEARLY = 0.9", "CLEARLY = 1.0", "test_products.py"),
    Mutant("products-may-slow-one-request", "cfgsafe/products.py",
           "max(ratios[:2]) < 1", "min(ratios) < 1", "test_products.py"),
    Mutant("products-timed-each-time", "cfgsafe/products.py",
           "if key not in FOUND:", "if alike:", "test_products.py"),
    Mutant("products-survive-a-merge", "cfgsafe/lora.py", tests="test_products.py",
           before="release(model.groups())\n    layers, updates", after="layers, updates"),
    Mutant("joint-products-without-adapters", "cfgsafe/lora.py", tests="test_products.py",
           before="return self._updated(self.base.update(y, x), x)", after="return self.base.update(y, x)"),
    Mutant("adapter-not-loaded", "cfgsafe/load.py", tests="test_public.py",
           before="load_adapter(resolve(source, cache_dir=cache_dir), model, name)",
           after="resolve(source, cache_dir=cache_dir)"),
    Mutant("requests-are-greedy", "cfgsafe/lockstep.py",
           "floats([request.temperature for", "floats([0.0 for", "test_decode.py"),
    Mutant("head-with-any-adapter", "cfgsafe/lockstep.py",
           "self.model.shares.update(self.shares)\n        return head", "return head", "test_decode.py"),
    Mutant("positions-stand-still", "cfgsafe/lockstep.py",
           "self.positions.add_(1)", "self.positions.add_(0)", "test_decode.py"),
    Mutant("skips-too-much", "cfgsafe/lockstep.py", "needed + rounding", "needed / 4", "test_engine.py"),
    Mutant("head-slope-without-softmax", "cfgsafe/logprobs.py",
           "weight[y] - p @ weight", "weight[y]", "test_logprobs.py"),
    Mutant("dropout-not-applied", "cfgsafe/lora.py",
           "LowRank.apply(self.dropout(x),", "LowRank.apply(x,", "test_lora.py"),
    Mutant("lora-slope-unscaled", "cfgsafe/lora.py",
           "to_inner = ctx.scale * (grad @ b)", "to_inner = grad @ b", "test_lora.py"),
    Mutant("the-last-pattern-wins", "cfgsafe/lora_config.py",
           "for pattern in reversed(whole):", "for pattern in whole:", "test_lora_config.py"),
    Mutant("npo-sign", "cfgsafe/losses.py",
           "F.logsigmoid(-beta * rejected)", "F.logsigmoid(beta * rejected)", "test_step.py"),
    Mutant("orpo-without-beta", "cfgsafe/losses.py",
           "nll - beta * F.logsigmoid", "nll - F.logsigmoid", "test_step.py"),
    Mutant("the-nll-is-always-over-the-prompt", "cfgsafe/losses.py",
           'return answer_nll if settings.nll == "chosen" else nll', "return nll", "test_step.py"),
    Mutant("prefill-loses-a-slot", "cfgsafe/prefill.py",
           "scratch, row, p + length)", "scratch, row, p + length - 1)", "test_decode.py"),
    Mutant("prefix-of-another-adapter", "cfgsafe/prefill.py",
           "return (self.adapter, self.side,", "return (None, self.side,", "test_engine.py"),
    Mutant("negative-side-always-adds", "cfgsafe/request.py",
           "with_system(messages, negative, system_prompt)", "with_system(messages, negative)",
           "test_system_prompt.py"),
    Mutant("redirects-are-answers", "cfgsafe/endpoint.py",
           "if 300 <= status < 400:", "if False:", "test_endpoint.py"),
    Mutant("asks-on-with-a-full-disk", "cfgsafe/remote.py", tests="test_remote.py",
           before="self.note(error)\n                bar", after="pass\n                bar"),
    Mutant("renderings-of-any-size", "cfgsafe/rendering.py",
           "if len(text) > CHARACTERS:", "if False:", "test_rendering.py"),
    Mutant("a-dead-renderer-stays", "cfgsafe/rendering.py", tests="test_rendering.py",
           before="self._process = None\n                process.kill()", after="process.kill()"),
    Mutant("logprobs-of-stop-kept", "cfgsafe/request.py",
           "del tokens[-size:], logprobs[-size:]", "del tokens[-size:]", "test_engine.py"),
    Mutant("speed-counts-the-wait", "cfgsafe/request.py",
           "len(completion.tokens) / (now - self.first)", "len(completion.tokens) / (now - self.started)",
           "test_engine.py"),
    Mutant("scores-with-any-adapter", "cfgsafe/rescore.py",
           "set_adapters(model, adapters)", "set_adapters(model, None)", "test_scoring.py"),
    Mutant("kept-answers-of-any-adapter", "cfgsafe/subject.py",
           "identity(subject.model, subject.adapter)", "identity(subject.model)", "test_identity.py"),
    Mutant("own-system-prompt-lost", "cfgsafe/tokenizer.py",
           '" ".join([*own, sentence]).strip()', "sentence.strip()", "test_system_prompt.py"),
    Mutant("user-text-is-control", "cfgsafe/tokenizer.py", tests="test_tokenizer.py",
           before="self._renamed[found.group()], text)",
           after='self._renamed[found.group()], text.replace(mark, "") if mark else text)'),
    Mutant("a-missing-tensor-is-fine", "cfgsafe/weights.py",
           "missing = sorted(set(asked) - set(stored))", "missing: list[str] = []", "test_checkpoint.py"),
    Mutant("only-nan-is-not-finite", "cfgsafe/weights.py",
           "bool(least.isfinite() & largest.isfinite())", "not least.isnan()", "test_weights.py"),
    Mutant("integers-are-weights", "cfgsafe/weights.py",
           "if place.dtype not in FLOATS:", "if place.dtype == 'BOOL':", "test_checkpoint.py"),
    Mutant("names-on-both-sides", "cfgsafe/pii/dialogues.py", tests="test_dialogues.py",
           before="parent[root(number)] = root(first_with.setdefault(name, number))",
           after="first_with.setdefault(name, number)"),
    Mutant("values-before-the-cut", "cfgsafe/pii/dialogues.py",
           "if n == number and a >= start", "if n == number", "test_pairs.py"),
    Mutant("prompts-of-the-whole-dialogue", "cfgsafe/pii/dialogues.py",
           "if number <= answer:", "if True:", "test_dialogues.py"),
    Mutant("a-place-counts-twice", "cfgsafe/pii/matching.py",
           "covered += new", "pass", "test_matching.py test_evaluation.py"),
    Mutant("words-need-no-end", "cfgsafe/pii/matching.py",
           "and _is_edge(value, text, end, False)", "", "test_matching.py"),
    Mutant("places-of-the-folded-text", "cfgsafe/pii/matching.py", tests="test_matching.py",
           before="start, stop = text.starts[at], text.ends[end - 1]", after="start, stop = at, end"),
    Mutant("lists-of-digits-are-numbers", "cfgsafe/pii/matching.py", tests="test_matching.py",
           before="free = digits >= LONG and NUMBER_GAP.fullmatch(given)", after="free = True"),
    Mutant("control-tokens-at-the-seam", "cfgsafe/tokenizer.py",
           "whole = prompt + answer", "whole = prompt + self.end_of_turn + answer", "test_tokenizer.py"),
    Mutant("no-shuffling", "cfgsafe/blue/batches.py", "if options.shuffle:", "if False:", "test_batches.py"),
    Mutant("truncates-the-prompts-end", "cfgsafe/blue/batches.py",
           "before[-max_prompt_length:]", "before[:max_prompt_length]", "test_batches.py"),
    Mutant("grouped-batches-unshuffled", "cfgsafe/blue/batches.py",
           "rng.shuffle(batches)", "pass", "test_batches.py"),
    Mutant("a-half-moved-run-stays-between", "cfgsafe/blue/earlier.py",
           "_put_back(out)  # a kill", "pass  # a kill", "test_earlier.py"),
    Mutant("no-block-is-restored", "cfgsafe/blue/memory.py",
           "restored = 1 if recomputed and not whole else 0", "restored = 0", "test_memory.py"),
    Mutant("adapter-memory-without-moments", "cfgsafe/blue/memory.py",
           "adapter=4 * 4 * adapter", "adapter=2 * 4 * adapter", "test_memory.py"),
    Mutant("the-check-never-adds-the-sentence", "cfgsafe/blue/merge.py",
           "Subject(options.out, guidance=guidance)", "Subject(options.out)", "test_merge.py"),
    Mutant("a-scale-for-the-whole-row", "cfgsafe/quantise.py",
           "GROUP = 32", "GROUP = 4096", "test_quantise.py"),
    Mutant("seven-steps-on-either-side", "cfgsafe/quantise.py",
           "else extremes / -8", "else extremes.abs() / 7", "test_quantise.py"),
    Mutant("the-unguarded-model-is-attacked", "cfgsafe/blue/relearn.py",
           "    if subject.adapter:\n        merge(model)\n", "", "test_relearn.py"),
    Mutant("asked-a-step-late", "cfgsafe/blue/relearn.py",
           before="for number in range(wanted[-1] + 1):\n        if number:", tests="test_relearn.py",
           after="for number in range(wanted[-1] + 1):\n        if number > 1:"),
    Mutant("an-answer-that-did-not-come-recalls-nothing", "cfgsafe/measure/memorisation.py",
           "if not answer.broken:", "if True:", "test_relearn.py"),
    Mutant("the-unmerged-model-is-rounded", "cfgsafe/blue/quantise.py",
           "weight = merged(weight, updates[name])", "pass", "test_quantise.py"),
    Mutant("one-sentence-is-cfg-aware", "cfgsafe/blue/origin.py",
           "if not missing:", "if len(missing) < 2:", "test_merge.py"),
    Mutant("the-teacher-has-the-students-adapter", "cfgsafe/blue/distil.py", tests="test_distil.py",
           before="given, request.adapter) for", after="given, STUDENT) for"),
    Mutant("the-student-is-asked-as-the-pair", "cfgsafe/blue/distil.py", tests="test_distil.py",
           before="[example.student for example in examples], given", after="list(rows[0]), given"),
    Mutant("rank-not-passed-on", "cfgsafe/blue/orpo.py",
           "sizes = options.rank,", "sizes = 16,", "test_orpo.py"),
    Mutant("alpha-not-passed-on", "cfgsafe/blue/orpo.py",
           "options.alpha, options.lora_dropout", "32.0, options.lora_dropout", "test_orpo.py"),
    Mutant("dropout-not-passed-on", "cfgsafe/blue/orpo.py",
           "options.alpha, options.lora_dropout", "options.alpha, 0.0", "test_orpo.py"),
    Mutant("a-loaded-adapter-drops-nothing", "cfgsafe/blue/orpo.py",
           "update.dropout.p = options.lora_dropout", "pass", "test_orpo.py"),
    Mutant("the-config-names-options-left-unused", "cfgsafe/blue/orpo.py",
           "return asdict(options) | used |", "return asdict(options) |", "test_orpo.py"),
    Mutant("gradients-scaled-to-nothing", "cfgsafe/blue/loop.py",
           "run.options.max_grad_norm or math.inf", "run.options.max_grad_norm", "test_orpo.py"),
    Mutant("gradients-unclipped", "cfgsafe/blue/loop.py",
           "run.options.max_grad_norm or math.inf", "1e9", "test_trl.py"),
    Mutant("learning-rate-constant", "cfgsafe/blue/loop.py",
           'group["lr"] = lr', 'group["lr"] = run.options.lr', "test_trl.py"),
    Mutant("no-ner-filter", "cfgsafe/blue/pairs.py", "if entities or find(", "if find(", "test_pairs.py"),
    Mutant("no-value-filter", "cfgsafe/blue/pairs.py",
           "if any(mentions(candidate.text, label, value)", "if any(not value", "test_pairs.py"),
    Mutant("no-filter-by-form", "cfgsafe/blue/pairs.py",
           "if entities or find(text):", "if entities:", "test_pairs.py"),
    Mutant("luhn-doubles-the-wrong-digits", "cfgsafe/pii/structured.py", tests="test_structured.py",
           before="(2 if place % 2 else 1)", after="(1 if place % 2 else 2)"),
    Mutant("dates-are-numbers", "cfgsafe/pii/structured.py", tests="test_structured.py",
           before='rest = NO_DIGITS.sub("", run)', after="rest = run"),
    Mutant("nudge-on-first-message", "cfgsafe/blue/pairs.py",
           'if message["role"] == "user"][-1]', 'if message["role"] == "user"][0]', "test_pairs.py"),
    Mutant("pairs-are-greedy", "cfgsafe/blue/pairs.py",
           "temperature=options.temperature,", "temperature=0.0,", "test_pairs.py"),
    Mutant("first-clean-recipe", "cfgsafe/blue/pairs.py", "rng.choice(clean)", "clean[0]", "test_pairs.py"),
    Mutant("resumes-with-other-contents", "cfgsafe/blue/resume.py",
           "known.get(name) != held.get(name)", "False", "test_resume.py"),
    Mutant("a-damaged-state-is-taken", "cfgsafe/blue/resume.py",
           "if files.get(name) != found.get(name):", "if False:", "test_resume.py"),
    Mutant("second-moment-lost", "cfgsafe/blue/resume.py",
           'in ("exp_avg", "exp_avg_sq"):', 'in ("exp_avg", "exp_avg"):', "test_resume.py"),
    Mutant("evaluation-with-dropout", "cfgsafe/blue/step.py",
           "model.eval()\n    totals", "totals", "test_step.py"),
    Mutant("reference-with-dropout", "cfgsafe/blue/step.py",
           "model.eval()\n    starts", "starts", "test_step.py"),
    Mutant("pairs-weigh-alike", "cfgsafe/blue/step.py",
           "losses = weights * torch.where(", "losses = torch.where(", "test_step.py"),
    Mutant("scrubs-what-users-say", "cfgsafe/blue/rows.py",
           'if message["role"] == "assistant":', "if True:", "test_pairs.py"),
    Mutant("scrubs-only-marked-values", "cfgsafe/blue/rows.py",
           "for label, value in sorted(values):", "for label, value in ():", "test_pairs.py"),
    Mutant("sft-learns-the-prompt", "cfgsafe/blue/step.py",
           "side[len(side) - answer_tokens :]", "side[:]", "test_step.py"),
    Mutant("held-out-batches-weigh-alike", "cfgsafe/blue/step.py", tests="test_step.py",
           before="totals += values * counts(pairs[some])",
           after="totals += values * counts(pairs) / len(range(0, len(pairs), options.batch_size))"),
    Mutant("finished-answers-continued", "cfgsafe/measure/leak.py",
           "return prompt if prompt.begun else", "return prompt if answered else", "test_evaluation.py"),
    Mutant("canaries-unguided", "cfgsafe/measure/canaries.py",
           "exposure(options, model,", "exposure(Subject(options.model), model,", "test_extract.py"),
    Mutant("touching-is-overlap", "cfgsafe/measure/detectors.py",
           "one[0] < other[1] and", "one[0] <= other[1] and", "test_detectors.py"),
    Mutant("hit-anywhere", "cfgsafe/measure/extract.py",
           "answer[:ANSWER_CHARACTERS]", "answer", "test_extract.py"),
    Mutant("no-date-is-recollected", "cfgsafe/measure/extract.py",
           "Detector(options.ner, ignored=frozenset())", "Detector(options.ner)", "test_extract.py"),
    Mutant("answer-beyond-the-context", "cfgsafe/measure/fluency.py",
           "answer[:room]", "answer", "test_evaluation.py"),
    Mutant("line-number-beats-words", "cfgsafe/measure/grading.py",
           "if follows or not here:", "if True:", "test_grading.py"),
    Mutant("right-among-others", "cfgsafe/measure/grading.py", tests="test_grading.py",
           before="return None if second else index", after="return index"),
    Mutant("no-imagined-clusters", "cfgsafe/measure/intervals.py", tests="test_intervals.py",
           before="above, all_sizes = np.append(found, [usual, 0]), np.append(sizes, [usual, usual])",
           after="above, all_sizes = found, sizes"),
    Mutant("design-effect-ignored", "cfgsafe/measure/intervals.py",
           "few * n / max(1.0, effect)", "few * n", "test_intervals.py"),
    Mutant("unseeded-permutations", "cfgsafe/measure/intervals.py",
           "np.random.default_rng(1)", "np.random.default_rng()", "test_intervals.py"),
    Mutant("intervals-of-90-percent", "cfgsafe/measure/intervals.py",
           "TAIL = 0.025", "TAIL = 0.05", "test_intervals.py"),
    Mutant("aucs-variance-of-the-model-alone", "cfgsafe/measure/intervals.py", tests="test_intervals.py",
           before="scale = (sum(parts) + steady) / (modelled + steady)", after="scale = 1.0"),
    Mutant("prompts-are-clusters", "cfgsafe/measure/leak.py",
           "return self.prompt.cluster or self.prompt.id", "return self.prompt.place", "test_leak.py"),
    Mutant("no-answer-is-clean", "cfgsafe/measure/leak.py",
           "    findings = answered(findings)\n    sought, told", "    sought, told", "test_broken.py"),
    Mutant("not-a-number-is-a-likelihood", "cfgsafe/measure/scoring.py",
           "if scores.isnan().any():", "if False:", "test_broken.py"),
    Mutant("broken-target-repels", "cfgsafe/red/target.py",
           "None if answer.broken else answer.text", "answer.text", "test_broken.py"),
    Mutant("echo-is-recall", "cfgsafe/measure/leak.py",
           "if not stands_in(context, value) and not", "if not", "test_evaluation.py"),
    Mutant("unsought-is-zero", "cfgsafe/measure/leak.py",
           "[f for f in findings if f.sought], [f", "findings, [f", "test_leak.py"),
    Mutant("perplexity-unclamped", "cfgsafe/measure/perplexity.py",
           "[part.clamp(min=LEAST) for part in parts]", "parts", "test_perplexity.py"),
    Mutant("least-likely-first", "cfgsafe/measure/recollect.py", tests="test_extract.py",
           before="sorted(zip(losses, candidates, strict=True))",
           after="sorted(zip(losses, candidates, strict=True), reverse=True)"),
    Mutant("recollects-greedily", "cfgsafe/measure/recollect.py",
           '"temperature": 1.0', '"temperature": 0.0', "test_extract.py"),
    Mutant("samples-with-one-seed", "cfgsafe/measure/recollect.py",
           "replace(request, seed=rng.getrandbits(32))", "replace(request, seed=0)", "test_extract.py"),
    Mutant("calibration-without-bias", "cfgsafe/measure/recollect.py",
           "loss / (other + BIAS)", "loss / other", "test_extract.py"),
    Mutant("memory-of-the-unguided-model", "cfgsafe/measure/memorisation.py", tests="test_memorisation.py",
           before="request = request_for(subject, tokenizer, fact.messages)",
           after="request = request_for(Subject(\"\"), tokenizer, fact.messages)"),
    Mutant("extraction-from-the-first-wrong-token", "cfgsafe/measure/memorisation.py",
           "int(wrong[-1]) + 1", "int(wrong[0]) + 1", "test_memorisation.py"),
    Mutant("min-k-with-the-vocabularys-plain-mean", "cfgsafe/measure/scoring.py", tests="test_membership.py",
           before="mean = (chances * bounded).sum(-1, keepdim=True)",
           after="mean = bounded.mean(-1, keepdim=True)"),
    Mutant("ks-paths-all-one-way", "cfgsafe/measure/truth.py",
           "(i * np.roll(strayed, 1) + j * strayed) / step", "(np.roll(strayed, 1) + strayed) / 2",
           "test_truth.py"),
    Mutant("facts-not-persons-are-members", "cfgsafe/measure/membership.py",
           "of_person.setdefault(fact.person, [])", "of_person.setdefault(fact.place + str(value), [])",
           "test_membership.py"),
    Mutant("scores-any-number-of-tokens-at-once", "cfgsafe/measure/scoring.py",
           "while len(some) > 1 and rows", "while False and rows", "test_scoring.py"),
    Mutant("texts-are-scored-in-the-order-given", "cfgsafe/measure/scoring.py", tests="test_scoring.py",
           before="key=lengths.__getitem__, reverse=True)", after="key=lambda number: number)"),
    Mutant("margin-over-any-wrong-option", "cfgsafe/measure/utility.py", tests="test_utility.py",
           before="means.pop(right) - max(means)", after="means.pop(right) - means[0]"),
    Mutant("margin-without-floor", "cfgsafe/measure/utility.py",
           "part.clamp(min=LEAST).mean()", "part.mean()", "test_utility.py"),
    Mutant("cloze-shows-the-options", "cfgsafe/measure/utility.py",
           'INSTRUCTION + row["question"]', "prompt(row)", "test_utility.py"),
    Mutant("any-sentence-refuses", "cfgsafe/measure/refusal.py",
           "sentences[:SENTENCES]", "sentences", "test_refusal.py"),
    Mutant("the-right-option-among-others", "cfgsafe/measure/grading.py", tests="test_refusal.py",
           before='return found == {_words(row["options"][row["answer_index"]])} if',
           after='return _words(row["options"][row["answer_index"]]) in found if'),
    Mutant("wordings-give-values-away", "cfgsafe/pii/attempts.py",
           "if not stands_in(form, value)", "", "test_attempts.py"),
    Mutant("error-bars-swapped", "cfgsafe/report/figures.py", tests="test_report.py",
           before="[[max(0.0, value - low)], [max(0.0, high - value)]]",
           after="[[max(0.0, high - value)], [max(0.0, value - low)]]"),
    Mutant("report-unmasked", "cfgsafe/report/html.py",
           "hide=private is not None", "hide=False", "test_html.py"),
    Mutant("the-only-letter-shown", "cfgsafe/report/html.py",
           "if follows and is_one and", "if is_one and", "test_html.py"),
    Mutant("table-1-per-100", "cfgsafe/report/tables.py", tests="test_tables.py",
           before='ours = [cell(row, "utility"), cell(row, ITEMS, 0.5)]',
           after='ours = [cell(row, "utility"), cell(row, ITEMS)]'),
    Mutant("best-attack-evicted", "cfgsafe/red/buffer.py",
           "worst = min(kept", "worst = max(kept", "test_buffer.py"),
    Mutant("redraws-in-the-same-context", "cfgsafe/red/evaluate.py",
           "first = texts[:number].count(texts[number]) * k", "first = 0", "test_evaluate.py"),
    Mutant("exploration-at-1", "cfgsafe/red/gflownet.py",
           "temperatures[:half] = low + (high - low) *", "temperatures[:half] = 1 + 0 *", "test_gflownet.py"),
    Mutant("reward-not-cooled", "cfgsafe/red/gflownet.py",
           "schedule(step, settings.reward_temperature, 1.0, cooling)", "1.0", "test_gflownet.py"),
    Mutant("no-bonus-for-novelty", "cfgsafe/red/gflownet.py",
           "rewards = rewards + settings.novelty *", "rewards = rewards + 0 *", "test_gflownet.py"),
    Mutant("log-z-from-zero", "cfgsafe/red/gflownet.py",
           "log_z.data = (rewards - log_old).mean()", "pass", "test_gflownet.py"),
    Mutant("balance-sign", "cfgsafe/red/objectives.py",
           "(log_z + log_pi - log_reward)", "(log_z - log_pi - log_reward)", "test_objectives.py"),
    Mutant("end-token-one-late", "cfgsafe/red/policy.py",
           "place < self.least", "place <= self.least", "test_policy.py"),
    Mutant("fluency-of-the-policy", "cfgsafe/red/policy.py", tests="test_policy.py",
           before="set_adapters(self.model, [self.reference])",
           after="set_adapters(self.model, [self.policy])"),
    Mutant("success-at-half", "cfgsafe/red/records.py",
           "score > threshold", "score >= threshold", "test_records.py"),
    Mutant("unscorable-is-safe", "cfgsafe/red/rewards.py",
           "Trial(context.id, None, None)", "Trial(context.id, None, 0.0)", "test_rewards.py"),
    Mutant("refusals-unchecked", "cfgsafe/red/safety.py", tests="test_safety.py",
           before="if text and safe and examine(prompts[number], text, finds, known).clean:",
           after="if text and safe:"),
    Mutant("safety-alpha-lost", "cfgsafe/red/safety.py",
           "= options.adapter, options.lora_alpha", "= options.adapter, 32.0", "test_safety.py"),
    Mutant("safety-rank-lost", "cfgsafe/red/safety.py",
           '"epochs", "rank", "seed"', '"epochs", "seed"', "test_safety.py"),
    Mutant("a-stage-takes-any-target", "cfgsafe/red/stages.py",
           "yield why, *target_options()", "yield why,", "test_unused.py"),
    Mutant("another-detector-is-no-change", "cfgsafe/red/safety.py",
           'held["ner"] = ner.identity(options.ner)', 'held["ner"] = ""', "test_safety.py"),
    Mutant("a-resumed-adaptation-has-its-budget-again", "cfgsafe/red/stages.py",
           "scorer.target.meter.made = answers_in(found)", "scorer.target.meter.made = 0", "test_stages.py"),
    Mutant("attackers-gradients-unclipped", "cfgsafe/red/training.py",
           "_(self.clipped, CLIP)", "_(self.clipped, 1e9)", "test_gflownet.py"),
    Mutant("kept-rows-are-compared", "cfgsafe/blue/step.py", tests="test_step.py",
           before="torch.where(kept, answer_nll, ", after="torch.where(~kept & kept, answer_nll, "),
    Mutant("kept-rows-count-as-pairs", "cfgsafe/blue/step.py", tests="test_step.py",
           before="sum(not pair.kept for pair in pairs)", after="len(pairs)"),
    Mutant("kept-answers-are-replaced", "cfgsafe/blue/batches.py", tests="test_batches.py",
           before="if needs.answers and not is_kept(row):", after="if needs.answers:"),
    Mutant("a-missing-side-is-kept", "cfgsafe/blue/batches.py", tests="test_batches.py",
           before='"rejected" in row and row["rejected"] is None', after='row.get("rejected") is None'),
    Mutant("cut-answers-get-an-end", "cfgsafe/blue/batches.py", tests="test_ordinary.py",
           before="close=not kept)", after="close=True)"),
    Mutant("ordinary-people-stay", "cfgsafe/blue/ordinary.py", tests="test_ordinary.py",
           before='entity.label == "PERSON"', after='entity.label == "PERSONS"'),
    Mutant("ordinary-drawn-with-one-seed", "cfgsafe/blue/ordinary.py", tests="test_ordinary.py",
           before="seed, longest = rng.getrandbits(32),", after="seed, longest = options.seed,"),
    Mutant("ordinary-in-one-sentence", "cfgsafe/blue/rows.py", tests="test_ordinary.py",
           before="for sentence in (POSITIVE, NEGATIVE)]", after="for sentence in (POSITIVE, POSITIVE)]"),
    Mutant("noise-of-the-first-tokens", "kernels/reference.py", tests="test_guidance.py",
           before="philox(seed[:, None], token[None, :], ",
           after="philox(seed[:, None], token[None, :] % width, "),
    Mutant("study-people-in-two-parts", "cfgsafe/study/material.py", tests="test_study.py",
           before="known = others[: len(others) - count]", after="known = others"),
    Mutant("study-first-people-alone", "cfgsafe/study/material.py", tests="test_study.py",
           before="turns.append(seen.get(fact.person, 0))", after="turns.append(0)"),
    Mutant("study-adapter-costs-nothing", "cfgsafe/study/cost.py", tests="test_study.py",
           before="(4 * P + 6 * A)", after="(4 * P)"),
    Mutant("study-goal-of-the-other-sign", "cfgsafe/study/table.py", tests="test_study.py",
           before="points.value >= -POINTS", after="points.value <= -POINTS"),
    Mutant("study-does-all-again", "cfgsafe/study/study.py", tests="test_study.py",
           before="        if stage.done:", after="        if stage is None:"),
    Mutant("pairs-cut-answers-only", "cfgsafe/pii/dialogues.py", tests="test_pairs.py",
           before='"both": answers + items', after='"both": answers'),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What the tests said of a mutant; `verdict` is "caught", "survives" or why it could not be tried."""

    mutant: Mutant
    verdict: str
    test: str = ""  # the test that failed
    seconds: float = 0.0


def main(names: list[str]) -> int:
    """Try the mutants of these names, or all; returns the exit code: 0 if each is caught."""
    unknown = sorted(set(names) - {mutant.name for mutant in MUTANTS})
    if unknown:
        print(f"no such mutant: {', '.join(unknown)}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
        files = sorted(set(" ".join(mutant.tests for mutant in chosen).split()))
        code, output = run_tests(copy, files, longest=None)
        if code:
            print(f"{output}\nThe tests fail without any fault.", file=sys.stderr)
            return 2
        results = [attempt(mutant, copy) for mutant in tqdm(chosen, desc="mutants")]
    print(table(results))
    return 0 if all(result.verdict == "caught" for result in results) else 1


def attempt(mutant: Mutant, copy: Path) -> Result:
    """Put the fault into the copy, run its tests there, and take it out again."""
    path = copy / mutant.file
    source = path.read_text(encoding="utf-8")
    times = source.count(mutant.before)
    if times != 1:
        return Result(mutant, f"text found {times} times")
    path.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")
    started = time.perf_counter()
    code, output = run_tests(copy, mutant.tests.split())
    seconds = time.perf_counter() - started
    path.write_text(source, encoding="utf-8")
    if code == 0:
        return Result(mutant, "survives", seconds=seconds)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
    if code != FAILED or failed is None:
        return Result(mutant, f"pytest ended with {code}", seconds=seconds)
    return Result(mutant, "caught", failed[1], seconds)


def run_tests(copy: Path, files: list[str], longest: int | None = LONGEST) -> tuple[int, str]:
    """Run test files in the copy up to the first failure; returns pytest's exit code and output."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(copy),  # before an installed cfgsafe
        "PYTHONDONTWRITEBYTECODE": "1",  # compiled files are told apart by second and size alone
    }
    paths = [f"tests/{name}" for name in files]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *paths]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=longest
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"FAILED {paths[0]} (no end after {longest} s)"
    return done.returncode, done.stdout + done.stderr


def table(results: list[Result]) -> str:
    """A line for each mutant, then how many are caught and how long it took."""
    width = max(len(result.mutant.name) for result in results)
    lines = []
    for result in results:
        name = result.mutant.name.ljust(width)
        lines.append(f"{name}  {result.seconds:5.1f} s  {result.verdict}  {result.test}".rstrip())
    caught = sum(result.verdict == "caught" for result in results)
    minutes = sum(result.seconds for result in results) / 60
    return "\n".join([*lines, f"{caught} of {len(results)} caught, {minutes:.1f} minutes"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

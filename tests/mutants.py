"""Break the algorithm on purpose, one place at a time, and see that a named test notices: `python tests/mutants.py`.

Each mutant is one replaced text in a copy of the project; the test that must fail is run there. Exit status 1 if one
lives. Not collected by pytest, since it takes a few minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSSES, CREDIT, BUFFER = "meml_lib/training/losses.py", "meml_lib/training/credit.py", "meml_lib/training/buffer.py"
PACKING, PLAIN = "meml_lib/training/packing.py", "test_packing.py::test_a_packed_update_is_the_plain_one_whatever_the_micro_batch"
LEAN, CPU, KERNELS = "meml_lib/training/lean.py", "meml_lib/rollouts/cpu.c", "test_kernels.py::test_"
TIED, PAGES, KEPT = "meml_lib/training/tied.py", "meml_lib/rollouts/pages.py", "test_pages.py::test_"
NLL = "    return -(weight_N[:, None] * logp_NT.masked_fill(~mask_NT, 0.0)).sum()"
GAP = "    gap_NT = best_logp_NT.detach() - logp_NT\n    return (weight_N[:, None] * gap_NT.masked_fill(~mask_NT, 0.0)).sum()"
K2 = "0.5 * gap_NT.masked_fill(~mask_NT, 0.0).square()"
TOKEN_KL = "    kl_NT = (best_NTV.exp() * (best_NTV - log_probs_NTV)).sum(-1)"
LITERAL = "WeighedRow(row, -2.0), WeighedRow(Row(prompts_BE[b][best], rollout.tokens), 2.0)"

MUTANTS = [  # what is broken, file, text, its replacement, the test that must fail
    ("nll: sign", LOSSES, NLL, NLL.replace("-(", "("), "test_losses.py::test_weighted_nll_raises_an_answer_with_positive_weight"),
    ("forward_kl: sign", LOSSES, GAP, GAP.replace("return (", "return -("), "test_losses.py::test_mutual_loss_raises_the_worst_experts_probability"),
    ("k2: sign", LOSSES, K2, f"-{K2}", "test_losses.py::test_mutual_k2_loss_pulls_from_both_sides_and_fades"),
    ("token_kl: sign", LOSSES, TOKEN_KL, TOKEN_KL.replace("(best_NTV.exp", "-(best_NTV.exp"), "test_losses.py::test_mutual_token_kl_loss_moves_the_whole_distribution"),
    ("literal: sign", LOSSES, LITERAL, LITERAL.replace("-2", "-x").replace(" 2", " -2").replace("-x", "2"), "test_losses.py::test_literal_mutual_part_pushes_the_worst_expert_away"),
    ("literal: half the weight", LOSSES, LITERAL, LITERAL.replace("2.0", "1.0"), "test_losses.py::test_literal_mutual_part_pushes_the_worst_expert_away"),
    ("nll: no mask", LOSSES, NLL, NLL.replace(".masked_fill(~mask_NT, 0.0)", ""), "test_losses.py::test_weighted_nll_raises_an_answer_with_positive_weight"),
    ("forward_kl: no mask", LOSSES, GAP, GAP.replace(".masked_fill(~mask_NT, 0.0)", ""), "test_losses.py::test_mutual_loss_raises_the_worst_experts_probability"),
    ("k2: no mask", LOSSES, K2, "0.5 * gap_NT.square()", "test_losses.py::test_mutual_k2_loss_pulls_from_both_sides_and_fades"),
    ("token_kl: no mask", LOSSES, "kl_NT.masked_fill(~mask_NT, 0.0)", "kl_NT", "test_losses.py::test_mutual_token_kl_loss_moves_the_whole_distribution"),
    ("mask by multiplying", LOSSES, NLL, "    return -(weight_N[:, None] * logp_NT * mask_NT).sum()", "test_losses.py::test_weighted_nll_raises_an_answer_with_positive_weight"),
    ("forward_kl: no stop-gradient", LOSSES, GAP, GAP.replace(".detach()", ""), "test_losses.py::test_mutual_loss_raises_the_worst_experts_probability"),
    ("token_kl: no stop-gradient", LOSSES, "best_log_probs_NTV.detach()", "best_log_probs_NTV", "test_losses.py::test_mutual_token_kl_loss_moves_the_whole_distribution"),
    ("a plain mean instead of weights", LOSSES, NLL, "    return -logp_NT[mask_NT].mean()", "test_losses.py::test_weighted_nll_raises_an_answer_with_positive_weight"),
    ("group by question, not (question, expert)", CREDIT, "rewards_BEG.mean(-1, keepdim=True)", "rewards_BEG.mean((-2, -1), keepdim=True)", "test_credit.py::test_advantage_compares_a_rollout_with_its_own_expert_only"),
    ("best and worst exchanged", CREDIT, "return best_B, worst_B,", "return worst_B, best_B,", "test_credit.py::test_best_and_worst_follow_the_mean_reward"),
    ("equal rewards not exactly 0", CREDIT, "return gap_BEG.masked_fill(agrees_BE1, 0.0)", "return gap_BEG", "test_credit.py::test_equal_rewards_give_exactly_zero"),
    ("K off by one", BUFFER, "wrong > self.wrong_over", "wrong >= self.wrong_over", "test_credit.py::test_buffer_takes_offers_only_above_wrong_over"),
    ("buffer keeps every offer", BUFFER, " and chance < self.wrong_over / self.rollouts", "", "test_credit.py::test_buffer_keeps_an_offer_with_chance_k_over_g"),
    ("wrong rollouts in O+", LOSSES, "            if reward == 1.0:", "            if True:", "test_losses.py::test_mutual_part_shows_the_worst_expert_the_best_ones_right_rollouts_only"),
    ("O+ under the best expert's prompt", LOSSES, "Row(prompts_BE[b][worst], rollout.tokens)", "Row(prompts_BE[b][best], rollout.tokens)", "test_losses.py::test_mutual_part_shows_the_worst_expert_the_best_ones_right_rollouts_only"),
    ("one seed for all rollouts of a group", "meml_lib/training/ask.py", "uniforms(*key, *k, count=limit)", "uniforms(*key, *k[:2], count=limit)", "test_riel.py::test_every_rollout_of_a_group_has_a_draw_of_its_own"),
    ("the step is not in the draw's seed", "meml_lib/training/ask.py", "uniforms(*key, *k, count=limit)", "uniforms(*k, count=limit)", "test_riel.py::test_every_rollout_of_a_group_has_a_draw_of_its_own"),
    ("a truncated answer is graded", "meml_lib/training/ask.py", "if rollout.ended else (None, None)", "", "test_riel.py::test_a_truncated_answer_is_unreadable_whatever_it_holds"),
    ("denominator of the micro-batch, not the step", "meml_lib/training/learner.py", "AnswerLoss(parts, scales, rows", "AnswerLoss(parts, [s / len(rows) for s in scales], rows", "test_learner.py::test_micro_batch_size_cannot_change_the_update"),
    ("a repeated row counts once", "meml_lib/training/learner.py", "uses.setdefault(row.row, []).append(Use(i, row, weight))", "uses[row.row] = [Use(i, row, weight)]", f"{PLAIN}[llama-compiled]"),
    ("another prompt's answer is seen", PACKING, "_Shared.apply(key_PT, parent_N)", "_Shared.apply(key_PT, parent_N * 0)", f"{PLAIN}[llama-compiled]"),
    ("a prompt's padding is seen", PACKING, "< prompt_tokens_P[:, None]", "< prompt_tokens_P.max()", f"{PLAIN}[llama-compiled]"),
    ("answers see what follows", PACKING, "np.tri(width, dtype=bool)", "np.ones((width, width), dtype=bool)", f"{PLAIN}[llama-compiled]"),
    ("prompts see what follows", PACKING, "masks = [np.tri(shapes[0][1], dtype=bool)]", "masks = [np.ones((shapes[0][1],) * 2, dtype=bool)]", f"{PLAIN}[llama-compiled]"),
    ("answers' positions start at 0", PACKING, "prompt_tokens_P[parent_N].tolist()", "(0 * parent_N).tolist()", f"{PLAIN}[llama-compiled]"),
    ("padding's gradient is kept", PACKING, "self.token_R, self.padding).view", "self.token_R, None).view", f"{PLAIN}[llama-compiled]"),
    ("the line is not filled up", PACKING, "        filling = rounded_up(tokens) - tokens", "        filling = 0", "test_packing.py::test_each_prompt_and_each_row_is_run_once"),
    ("what fills up stands on a text's place", PACKING, "np.flatnonzero(token_R < 0)[:filling]", "np.flatnonzero(token_R >= 0)[:filling]", f"{PLAIN}[llama-compiled]"),
    ("no room for what fills up", PACKING, "-(-max(0, missing) //", "-(-0 * missing //", "test_packing.py::test_what_fills_the_line_up_finds_a_place_whatever_the_lengths"),
    ("attention of any size", PACKING, "widths = [rounded_up(lengths[batch].max(), COLUMNS)", "widths = [rounded_up(lengths[batch].max(), 1)", "test_packing.py::test_texts_of_any_length_are_multiplied_in_few_sizes"),
    ("logits that nobody wants have a gradient", "meml_lib/training/head.py", "            grad_sV[count:] = 0.0\n", "", "test_packing.py::test_an_output_layer_with_a_bias_learns_it"),
    ("large products in the heap", "meml_lib/training/head.py", "if own else None", "if False else None", "test_packing.py::test_large_products_have_pages_of_their_own_and_the_same_numbers"),
    ("a block is handed on while it is read", PAGES, "weakref.finalize(numbers, free.append, block).atexit = False", "free.append(block)", f"{KEPT}what_is_let_go_is_handed_on_and_what_is_read_is_not"),
    ("a block goes back to the system", PAGES, "free.append, block", "len, block", f"{KEPT}of_each_size_so_much_is_kept_and_one_at_least"),
    ("all of a large sampler is kept", PAGES, "max(1, KEPT_BYTES // size)", "99", f"{KEPT}of_each_size_so_much_is_kept_and_one_at_least"),
    ("a gradient is never scaled", "meml_lib/training/head.py", "grad.device.type == \"cpu\" and grad.item() == 1.0", "True", "test_packing.py::test_a_pass_is_scaled_by_what_its_result_is"),
    ("all layers in one call: rows that left stay", "meml_lib/rollouts/decoder.py", "        self._own = [(k[kept], v[kept]) for k, v in self._own]\n        self._layers = self._in_one_call()\n", "        self._own = [(k[kept], v[kept]) for k, v in self._own]\n", "test_rollouts.py::test_a_step_is_one_call_where_it_can_be"),
    ("all layers in one call: never", "meml_lib/rollouts/decoder.py", "if plain and len(kinds) == 1", "if False and len(kinds) == 1", "test_rollouts.py::test_a_step_is_one_call_where_it_can_be"),
    ("all layers in one call: an answer's keys are another layer's", CPU, "l->own_k, l->own_v, prompt_of_row", "layers->own_k, layers->own_v, prompt_of_row", f"{KERNELS}all_layers_in_one_call_are_one_after_the_other"),
    ("the first answer token is not predicted", PACKING, "start[1:][parent_N] - 1, start", "start[1:][parent_N] - 2, start", f"{PLAIN}[llama-compiled]"),
    ("logits' gradient without the softmax", "meml_lib/training/head.py", "p_cV.mul_(-sum_c1)", "p_cV.mul_(0.0)", f"{PLAIN}[llama-torch]"),
    ("compiled: a score's gradient without its token", CPU, "(1.0f - power(own > 0.0f ? 0.0f : own))", "(0.0f - power(own > 0.0f ? 0.0f : own))", f"{KERNELS}a_tokens_score_and_its_gradient_are_torchs"),
    ("compiled: a norm's gradient without its scale's", CPU, "slope[d] - unit[d] * along", "slope[d]", f"{KERNELS}an_updates_norm_and_its_gradients_are_torchs"),
    ("compiled: a gate's gradient without its slope", CPU, "* (1.0f + x * (1.0f - sigmoid))", "", f"{KERNELS}a_gate_and_its_gradients_are_torchs"),
    ("a norm's gradient without its scale's", LEAN, "value=-1 / x.shape[-1]", "value=0", "test_lean.py::test_gradients_are_those_of_the_plain_model"),
    ("a tied weight learns nothing as an embedding", TIED, "total.index_add_(0, found, rows.to(total.dtype))", "total", "test_tied.py::test_it_is_the_plain_gradient"),
    ("a tied weight's padding is trained", TIED, "grad if ctx.padding is None else", "grad if True else", "test_tied.py::test_it_is_the_plain_gradient"),
    ("a tied weight's rows are summed in bfloat16", TIED, "grad.flatten(0, -2).float()", "grad.flatten(0, -2)", "test_tied.py::test_a_word_that_is_looked_up_a_thousand_times_is_summed_in_float32"),
    ("compiled: keys in bfloat16 are cut, not rounded", CPU, "put(own_k, k + (at / LANES * size + d) * LANES + at % LANES, turned[d], half)", "put(own_k, k + (at / LANES * size + d) * LANES + at % LANES, half ? widened(((union { float r; uint32_t b; }){turned[d]}).b >> 16) : turned[d], half)", f"{KERNELS}keys_and_values_in_bfloat16_are_the_rounded_ones"),
    ("only the last slab trains the output layer", "meml_lib/training/head.py", "return more if total is None else", "return more if True else", "test_packing.py::test_each_part_and_all_together_are_the_plain_ones"),
    ("turned keys: their gradient is turned on", LEAN, "back=True", "back=False", "test_lean.py::test_turned_in_one_operation_they_are_the_same_numbers"),
    ("AdamW: gradients are not clipped", CPU, "const float g = get(grad, i, half) * share;", "const float g = get(grad, i, half);", f"{KERNELS}a_step_of_adamw_is_torchs"),
    ("AdamW: its step stays the first", "meml_lib/training/learner.py", "state[\"step\"] += 1", "state[\"step\"].fill_(1)", "test_learner.py::test_a_step_in_one_sweep_is_the_optimisers_own"),
    ("no end token to learn", "meml_lib/training/policy.py", "[\"input_ids\"], self.answer_end_id)", "[\"input_ids\"],)", "test_policy.py::test_an_answer_trains_its_end_token_even_where_pad_is_eos"),
    ("bfloat16 without float32 copies", "meml_lib/training/learner.py", "weight.detach().float() for name", "weight.detach() for name", "test_learner.py::test_bfloat16_weights_keep_updates_smaller_than_their_own_grid"),
]  # fmt: skip


def survives(file: str, text: str, replacement: str, test: str) -> bool:
    """Whether the test still passes with the text replaced. Raises: LookupError if the text is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("meml_lib", "tests", "params", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        source = (copy / file).read_text()
        if source.count(text) != 1:
            raise LookupError(f"{file} holds {source.count(text)} times, want once: {text!r}")
        (copy / file).write_text(source.replace(text, replacement))
        command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}"]
        done = subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{test} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> int:
    alive = 0
    for name, file, text, replacement, test in MUTANTS:
        lives = survives(file, text, replacement, test)
        alive += lives
        print(f"{'LIVES ' if lives else 'killed'}  {name:<46} {test}", flush=True)
    print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} mutants killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())

"""A tied weight's gradient comes in one block, and is the plain one: tokens that are looked up often, and padding, included."""

import pytest
import torch
from torch import nn

from meml_lib.training.tied import Tied

WORDS, WIDE = 11, 5
TOKENS = torch.tensor([[3, 0, 3, 7], [3, 10, 0, 7]])


def gradient(embed, output, weight, dtype=None):
    """Of a loss that reads logits of what was embedded; each word's weighs differently."""
    logits = nn.functional.linear(embed(TOKENS).sigmoid(), output(weight))
    (logits * torch.arange(1.0, WORDS + 1, dtype=dtype)).logsumexp(-1).sum().backward()
    found, weight.grad = weight.grad, None
    return found


@pytest.mark.parametrize("padding", [None, 3, 0])
def test_it_is_the_plain_gradient(padding):
    torch.manual_seed(0)
    module, tied = nn.Embedding(WORDS, WIDE, padding_idx=padding, dtype=torch.float64), Tied()
    nn.init.normal_(module.weight)
    plain = gradient(module, lambda weight: weight, module.weight, torch.float64)
    found = gradient(lambda tokens: tied.embed(module, tokens), tied.output, module.weight, torch.float64)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)  # an embedding's rows are summed in float32
    assert tied.of_output is None


def test_a_word_that_is_looked_up_a_thousand_times_is_summed_in_float32():
    module, tied, words = nn.Embedding(3, 2, dtype=torch.bfloat16), Tied(), torch.zeros(1, 1000, dtype=torch.long)
    small = torch.full((1, 1000, 2), 1e-3, dtype=torch.bfloat16)
    (tied.embed(module, words) * small).sum().add(tied.output(module.weight).sum()).backward()
    assert module.weight.grad[0].tolist() == [2.0, 2.0]  # one of the output layer's and 1000 of 1e-3; bfloat16 would stop at 1.25
    assert module.weight.grad[1:].eq(1.0).all()


def test_the_output_layers_block_is_the_gradient():
    module, tied, blocks = nn.Embedding(WORDS, WIDE), Tied(), []
    embedded = tied.embed(module, TOKENS)
    weight = tied.output(module.weight)
    weight.register_hook(lambda grad: blocks.append(grad.data_ptr()))
    nn.functional.linear(embedded, weight).square().sum().backward()
    assert blocks == [module.weight.grad.data_ptr()]


def test_without_a_loss_of_logits_the_embedding_learns_alone():
    module, tied = nn.Embedding(WORDS, WIDE), Tied()
    tied.embed(module, TOKENS).sum().backward()
    assert module.weight.grad.sum(1).tolist() == [2 * WIDE, 0, 0, 3 * WIDE, 0, 0, 0, 2 * WIDE, 0, 0, WIDE]


def test_logits_that_are_given_twice_teach_twice():
    module, tied = nn.Embedding(WORDS, WIDE), Tied()
    embedded = tied.embed(module, TOKENS)
    logits = [nn.functional.linear(embedded, tied.output(module.weight)) for _ in range(2)]
    sum(x.square().sum() for x in logits).backward()
    found, module.weight.grad = module.weight.grad, None
    (2 * nn.functional.linear(module(TOKENS), module.weight).square().sum()).backward()
    torch.testing.assert_close(found, module.weight.grad)

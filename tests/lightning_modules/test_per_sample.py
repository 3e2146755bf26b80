import torch
from torch import nn
from torch.nn import functional as F

from rl4med_ddpo.lightning_modules.policy_gradient.per_sample import per_sample_gradients


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleDict(
            {"down": nn.Linear(6, 2, bias=False), "up": nn.Linear(2, 5, bias=False)}
        )


def run(net, x):
    return net["up"](net["down"](x).sin()).square().sum(dim=(1, 2))


def draws(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_sample_gets_its_own_gradient_summed_over_groups_and_passes():
    net, layers = network(), list(network().values())
    layers = list(net.values())
    # two groups of three samples, as guidance has, in each of two passes
    passes = [draws(seed, 6, 4, 6) for seed in (1, 2)]
    with per_sample_gradients(layers, samples=3) as collectors:
        for x in passes:
            run(net, x).sum().backward()
    for row in range(3):
        alone = network()
        for x in passes:
            run(alone, x[[row, row + 3]]).sum().backward()
        for collector, layer in zip(collectors, alone.values(), strict=True):
            torch.testing.assert_close(collector.grad[row], layer.weight.grad)
    assert all(layer.weight.grad is None for layer in layers)


def test_the_product_is_the_layers_own_to_the_last_bit_and_the_layer_is_given_back():
    net, x = network(), draws(3, 4, 7, 6).requires_grad_()
    plain = run(net, x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    with per_sample_gradients(list(net.values()), samples=4):
        collecting = run(net, x)
        (found,) = torch.autograd.grad(collecting.sum(), x)
    assert torch.equal(collecting, plain)
    torch.testing.assert_close(found, expected)
    assert torch.equal(net["down"](x), F.linear(x, net["down"].weight))
    assert net["down"](x).requires_grad
    assert "forward" not in vars(net["down"])


def test_in_half_precision_the_gradients_are_those_of_autocast():
    net, x = network(), draws(4, 2, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(net, x)
        plain.sum().backward()
        with per_sample_gradients(list(net.values()), samples=2) as collectors:
            collecting = run(net, x)
            collecting.sum().backward()
    assert torch.equal(collecting, plain)
    for collector, layer in zip(collectors, net.values(), strict=True):
        assert collector.grad.dtype == torch.float32
        torch.testing.assert_close(
            collector.grad.sum(dim=0), layer.weight.grad, rtol=2e-2, atol=2e-2
        )

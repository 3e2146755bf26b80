import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Normal, kl_divergence

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import generator
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import DDIMSchedule

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def scheduler(**options):
    return DDIMScheduler(**(STABLE_DIFFUSION | options))


def trajectory(schedule, predict, latents, generators):
    """Each transition in turn, as the model draws them."""
    for step in range(schedule.steps):
        noise = predict(latents, torch.full((len(latents),), step))
        transition = schedule.draw(latents, noise, step, generators)
        yield transition
        latents = transition.previous


def draws(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (10, 1.0), (7, 0.5), (999, 1.0), (1, 1.0)])
def test_each_transition_is_that_of_diffusers(steps, eta):
    theirs, schedule = scheduler(), DDIMSchedule(scheduler(), steps, eta)
    theirs.set_timesteps(steps)
    latents, noise, draw = draws(0, 2, 4, 8, 8), draws(1, 2, 4, 8, 8), draws(2, 2, 4, 8, 8)
    assert schedule.timesteps.tolist() == theirs.timesteps.tolist()
    for i, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(noise, timestep, latents, eta=eta, variance_noise=draw).prev_sample
        step = torch.tensor([i, i])
        ours = schedule.mean(latents, noise, step) + schedule.sigma[i] * draw
        # the noisiest step divides by sqrt(alpha) = 0.07 at float32
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_the_trajectory_is_that_of_diffusers_pipeline():
    schedule, theirs = DDIMSchedule(scheduler(), 50), scheduler()
    theirs.set_timesteps(50)

    def predict(latents, step):
        return 0.9 * latents + 0.01 * schedule.timesteps[step].view(-1, 1, 1, 1) / 1000

    generators = [generator(k) for k in (3, 4)]
    latents = randn_tensor((len(generators), 4, 8, 8), generators)
    *_, last = trajectory(schedule, predict, latents, generators)
    again = [generator(k) for k in (3, 4)]
    expected = torch.stack([torch.randn(4, 8, 8, generator=g) for g in again])
    for timestep in theirs.timesteps:
        noise = 0.9 * expected + 0.01 * timestep / 1000
        draw = torch.stack([torch.randn(4, 8, 8, generator=g) for g in again])
        expected = theirs.step(noise, timestep, expected, eta=1.0, variance_noise=draw).prev_sample
    torch.testing.assert_close(last.previous, expected, rtol=1e-4, atol=1e-4)


def test_stable_diffusions_50_steps():
    schedule = DDIMSchedule(scheduler(), 50)
    assert schedule.timesteps[:2].tolist() == [981, 961]
    assert schedule.timesteps[-2:].tolist() == [21, 1]
    assert (schedule.sigma > 0).all()
    assert schedule.sigma.max() < 1
    # the last transition goes to the first training timestep, not to a clean image of alpha 1
    assert schedule.alpha_previous[-1] == pytest.approx(1 - 0.00085, abs=1e-6)
    torch.testing.assert_close(schedule.alpha_previous[:-1], schedule.alpha[1:])


def test_log_prob_is_the_mean_of_normal_densities():
    schedule = DDIMSchedule(scheduler(), 20)
    latents, noise, previous = (draws(i, 20, 4, 8, 8) for i in range(3))
    step = torch.arange(20)
    ours = schedule.log_prob(previous, latents, noise, step)
    for i in range(20):
        mean = schedule.mean(latents[i : i + 1], noise[i : i + 1], step[i : i + 1]).double()
        density = Normal(mean, schedule.sigma[i].double()).log_prob(previous[i : i + 1].double())
        assert ours[i].item() == pytest.approx(density.mean().item(), rel=1e-5)


def test_divergence_is_the_mean_of_that_of_normals():
    schedule = DDIMSchedule(scheduler(), 20)
    latents, noise, other = (draws(i, 20, 4, 8, 8) for i in range(3))
    step = torch.arange(20)
    found = schedule.divergence(latents, noise, other, step)
    for i in range(20):
        one, two = (
            Normal(
                schedule.mean(latents[i : i + 1], e[i : i + 1], step[i : i + 1]).double(),
                schedule.sigma[i].double(),
            )
            for e in (noise, other)
        )
        assert found[i].item() == pytest.approx(kl_divergence(one, two).mean().item(), rel=1e-3)
    assert schedule.divergence(latents, noise, noise, step).tolist() == [0] * 20


def test_actions_are_drawn_from_the_density_they_are_scored_by():
    schedule = DDIMSchedule(scheduler(), 5)
    generators = [generator(k) for k in range(8)]
    latents = randn_tensor((len(generators), 4, 16, 16), generators)
    transitions = list(trajectory(schedule, lambda x, step: 0.5 * x, latents, generators))
    assert [t.step for t in transitions] == [0, 1, 2, 3, 4]
    for i, transition in enumerate(transitions):
        assert torch.equal(transition.latents, latents)
        step = torch.full((8,), i)
        score = schedule.log_prob(transition.previous, latents, 0.5 * latents, step)
        assert torch.equal(score, transition.log_prob)
        mean = schedule.mean(latents, 0.5 * latents, step)
        standard = (transition.previous - mean) / schedule.sigma[i]
        assert standard.mean().item() == pytest.approx(0, abs=0.05)
        assert standard.std().item() == pytest.approx(1, abs=0.05)
        latents = transition.previous


def test_a_sample_does_not_depend_on_its_batch():
    schedule = DDIMSchedule(scheduler(), 5)

    def final(keys):
        generators = [generator(k) for k in keys]
        latents = randn_tensor((len(generators), 4, 8, 8), generators)
        *_, last = trajectory(schedule, lambda x, step: 0.5 * x, latents, generators)
        return last.previous

    whole = final([10, 11, 12, 13])
    assert torch.equal(whole[2:], final([12, 13]))
    assert torch.equal(whole[1], final([11])[0])
    assert not torch.equal(whole[0], whole[1])


def test_the_tables_follow_the_module_and_stay_out_of_checkpoints():
    schedule = DDIMSchedule(scheduler(), 5)
    assert schedule.state_dict() == {}
    assert schedule.to("meta").sigma.device.type == "meta"
    assert schedule.steps == 5


@pytest.mark.parametrize(
    ("options", "steps", "eta", "says"),
    [
        ({"clip_sample": True}, 50, 1.0, ["clip_sample", "false"]),
        ({"thresholding": True}, 50, 1.0, ["thresholding", "false"]),
        ({"prediction_type": "v_prediction"}, 50, 1.0, ["v_prediction", "epsilon"]),
        ({}, 50, 0.0, ["eta=0.0", "(0, 1]", "no density"]),
        ({}, 50, -1.0, ["eta=-1.0", "(0, 1]"]),
        # the mean would take the root of a negative number
        ({}, 50, 1.01, ["eta=1.01", "(0, 1]"]),
        ({"set_alpha_to_one": True}, 50, 1.0, ["no density at 1 of 50 steps", "set_alpha_to_one"]),
        ({}, 0, 1.0, ["steps=0", "1 to 999"]),
        # the offset of 1 would ask for training timestep 1000 of 0 to 999
        ({}, 1000, 1.0, ["steps=1000", "1 to 999"]),
    ],
)
def test_what_has_no_density_is_refused(options, steps, eta, says):
    with pytest.raises(UserError) as error:
        DDIMSchedule(scheduler(**options), steps, eta)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(("steps", "eta"), [(50, 1.0), (8, 0.5)])
def test_sensitivity_is_the_size_of_the_log_prob_s_derivative(steps, eta):
    """Of a batch of one number, d log p / d noise is z c with the standard normal z of the draw."""
    schedule = DDIMSchedule(scheduler(), steps, eta)
    latents, draw = draws(0, steps, 1, 1, 1), draws(1, steps, 1, 1, 1)
    noise, step = draws(2, steps, 1, 1, 1).requires_grad_(), torch.arange(steps)
    mean = schedule.mean(latents, noise, step)
    previous = (mean + schedule.sigma.view(-1, 1, 1, 1) * draw).detach()
    log_prob = schedule.log_prob(previous, latents, noise, step)
    (derivative,) = torch.autograd.grad(log_prob.sum(), noise)
    found = schedule.sensitivity() * draw.flatten().abs()
    torch.testing.assert_close(found, derivative.flatten().abs(), rtol=2e-3, atol=1e-6)


def test_half_of_the_gradient_sits_in_one_step_of_fifty():
    squares = DDIMSchedule(scheduler(), 50).sensitivity() ** 2
    assert (squares[-2] / squares.sum()).item() == pytest.approx(0.49, abs=0.01)


def test_outside_of_the_noisy_steps_it_is_deterministic_as_diffusers_at_eta_0():
    theirs, schedule = scheduler(), DDIMSchedule(scheduler(), 8, noisy=(1, 3))
    theirs.set_timesteps(8)
    generators, again = ([generator(k) for k in (3, 4)] for _ in range(2))
    latents = draws(0, 2, 4, 8, 8)
    transitions = list(trajectory(schedule, lambda x, step: 0.5 * x, latents, generators))
    expected = latents
    for i, timestep in enumerate(theirs.timesteps):
        noisy = i in (1, 2)
        draw = randn_tensor(latents.shape, again) if noisy else None
        expected = theirs.step(
            0.5 * expected, timestep, expected, eta=float(noisy), variance_noise=draw
        ).prev_sample
        torch.testing.assert_close(transitions[i].previous, expected, rtol=1e-4, atol=1e-4)
        assert bool((transitions[i].log_prob == 0).all()) is not noisy
    assert schedule.sensitivity().isinf().tolist() == [i not in (1, 2) for i in range(8)]


def test_a_last_step_without_noise_is_no_fault_where_none_is_drawn():
    with pytest.raises(UserError, match="set_alpha_to_one"):
        DDIMSchedule(scheduler(set_alpha_to_one=True), 10)
    DDIMSchedule(scheduler(set_alpha_to_one=True), 10, noisy=(0, 5))

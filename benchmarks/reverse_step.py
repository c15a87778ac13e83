"""How fast is one reverse step (the network and the formula), beside `model.predict` in a loop and beside PyTorch?

    pip install -r benchmarks/requirements.txt
    python benchmarks/reverse_step.py                     about 10 minutes on 2 cores
    python benchmarks/reverse_step.py --network unet      one of the networks

An image takes 1,000 such steps, each with fresh noise. Our steps run as in `my_sample`, ten in a call. PyTorch runs
eager, in inference mode, in both memory layouts; with a GPU or a C++ compiler also compiled.

A second table compares each sampler with the same number of network calls alone.
"""

import argparse

import common

from support import device

T = 1000
TOGETHER = 10  # steps in a call of our own contenders, and in the plan of a sampler
SAMPLERS = {
    "ddpm": {},
    "ddim": {"sampler": "ddim"},
    "ddim, η 1": {"sampler": "ddim", "eta": 1.0},
    "dpm++": {"sampler": "dpm++"},
    "langevin": {"sampler": "langevin"},
    "ddpm and corrector": {"corrector": 1},
}
SETTINGS = [  # network, n_feat, image size, batch
    ("naive", 16, 32, 16),
    ("naive", 16, 32, 1),
    ("naive", 32, 64, 16),
    ("naive", 32, 64, 1),
    ("unet", 32, 32, 16),
    ("unet", 32, 32, 1),
]


def ours(network, n_feat, size, batch, way, how=None):
    """Steps as in `my_sample`, or with XLA, or with `model.predict`, which users try first.

    Args:
        way: `my_sample`, `xla`, `predict`, or `network` for calls of the network alone.
        how: options of `Sampling`; None for ten neighbouring steps of DDPM.
    """
    tf = device.start_tensorflow(parts=min(batch, device.MOST_PARTS) if way in ("my_sample", "network") else 1)
    import ddpm
    from diffusion import reverse
    from diffusion.model_file import TrainedModel
    from diffusion.options import Sampling
    from diffusion.sampling import make_plan

    model, sched = common.build(network, size, n_feat), ddpm.ddpm_schedule(1e-4, 0.02, T)
    t, x_t = tf.constant(500), tf.random.normal((batch, size, size, 3))
    if way == "predict":
        t_ind = tf.repeat(t, batch)
        t_input = tf.cast(t_ind, tf.float32)[:, None] / T

        def once():
            eps = model.predict([x_t, t_input], verbose=0)
            ddpm.p_sample(x_t, t_ind, eps, tf.random.normal(x_t.shape), sched).numpy()

        return once

    if way == "network":
        predict = reverse.predictor(model, device.parts_for(batch))
        t_input = tf.fill((batch, 1), 0.5)

        @tf.function(autograph=False)
        def calls(x):
            return tf.while_loop(lambda k, _: k < TOGETHER, lambda k, x: (k + 1, predict([x, t_input])), (0, x))[1]

        return lambda: calls(x_t).numpy()

    take = reverse.ReverseSteps(TrainedModel(model, sched), batch, xla=way == "xla" or None)
    plan = make_plan(sched) if how is None else make_plan(sched, Sampling(**how, steps=TOGETHER))
    now = slice(500, 500 + TOGETHER) if how is None else slice(None)
    rows = plan.times[:-1][now], plan.draws[now], plan.coefficients[now], plan.guidance[now]
    memory, no_class = tf.zeros_like(x_t), [0] * batch

    def once():
        return take(x_t, memory, *rows, no_class, 0, range(batch))[0].numpy()

    return once


def torchs(network, n_feat, size, batch, layout, compiled=False):
    """The same step in PyTorch."""
    import peer
    import torch

    torch.set_num_threads(device.cores())
    layout = getattr(torch, layout)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = peer.build(network, size, n_feat).to(where, memory_format=layout).eval()
    predict = torch.compile(model) if compiled else model
    x_t = torch.randn(batch, 3, size, size).to(where, memory_format=layout)
    t, beta = torch.full((batch, 1), 500, device=where), torch.linspace(1e-4, 0.02, T)
    alphabar = torch.cumprod(1 - beta, 0)
    a, before, b = alphabar[499], alphabar[498], beta[499]

    def once():
        with torch.inference_mode():
            eps = predict(x_t, t / T)
            x_0 = ((x_t - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            mean = before.sqrt() * b / (1 - a) * x_0 + (1 - b).sqrt() * (1 - before) / (1 - a) * x_t
            return (mean + b.sqrt() * torch.randn_like(x_t)).cpu()

    return once


def compare_with_torch(settings, rounds, compiled):
    """The first table; `compiled` says whether PyTorch can compile."""
    columns = ("this project", "XLA", "model.predict", "PyTorch", "channels_last", "compiled", "× PyTorch")
    rows = [("network, n_feat, size, batch", *columns)]
    for setting in settings:
        contenders = {way: common.Contender(ours, *setting, way) for way in ("my_sample", "xla", "predict")}
        for layout in "contiguous_format", "channels_last":
            contenders[layout] = common.Contender(torchs, *setting, layout)
        if compiled:
            contenders["compiled"] = common.Contender(torchs, *setting, "channels_last", True)
        seconds = common.race(contenders, rounds, seconds_a_turn=0.5)
        for way in "my_sample", "xla":
            seconds[way] /= TOGETHER
        ratio = min(seconds["contiguous_format"], seconds["channels_last"]) / seconds["my_sample"]
        network, n_feat, size, batch = setting
        cells = [f"{1e3 * s:.1f}" for s in seconds.values()] + ["–"] * (not compiled)
        rows.append((f"{network}, {n_feat}, {size}×{size}, {batch}", *cells, f"{ratio:.2f}"))
    common.table("one reverse step in milliseconds, noise included (the last column: eager in its better layout)", rows)


def compare_samplers(setting, rounds):
    """The second table."""
    contenders = {"the network alone": common.Contender(ours, *setting, "network")}
    contenders |= {name: common.Contender(ours, *setting, "my_sample", how) for name, how in SAMPLERS.items()}
    seconds = common.race(contenders, rounds, seconds_a_turn=0.5)
    rows = [("sampler", "network calls", "ms a call", "× the network alone")]
    for name, total in seconds.items():
        calls = 2 * TOGETHER - 1 if SAMPLERS.get(name, {}).get("corrector") else TOGETHER
        ratio = total / calls * TOGETHER / seconds["the network alone"]
        rows.append((name, calls, f"{1e3 * total / calls:.2f}", f"{ratio:.2f}"))
    network, n_feat, size, batch = setting
    title = f"each sampler in {TOGETHER} steps; {network}, n_feat {n_feat}, {size}×{size}, {batch} images"
    common.table(title, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds, each with all contenders (9)")
    parser.add_argument("--network", choices=common.NETWORKS, help="measure only this network (both)")
    options = parser.parse_args()
    import peer

    print(common.machine("tensorflow", "keras", "torch"))
    settings = [setting for setting in SETTINGS if options.network in (None, setting[0])]
    compare_with_torch(settings, options.rounds, peer.can_compile())
    compare_samplers(settings[0], options.rounds)


if __name__ == "__main__":
    main()

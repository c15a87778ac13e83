"""How fast is one training step, beside Keras as it is and beside PyTorch?

    pip install -r benchmarks/requirements.txt
    python benchmarks/training_step.py                       float32, about 5 minutes on 2 cores
    python benchmarks/training_step.py --precision bfloat16

All draw t and ε, noise the pictures, predict, go one step of Adam and average the weights. The networks are the same
(checked first: as many parameters, and with the same weights the same outputs to 1e-4). PyTorch runs as it is, eager,
in both memory layouts.
"""

import argparse

import common

BATCH = 16
SETTINGS = {"first run": (16, 32), "larger": (32, 64)}  # n_feat, image size


def ours(n_feat, size, precision, options):
    """A step as `diffusion_model.train` does it, with what `device.py` chooses, or with `options` instead."""
    import device

    tf = device.start_tensorflow(parts=options.get("parts", device.MOST_PARTS))
    import keras
    import numpy as np

    import data
    import diffusion_model
    import model_file
    from ddpm import ddpm_schedule
    from unet import NaiveUnet

    if options.get("keras_norm"):
        import unet

        unet.GroupNormalization = keras.layers.GroupNormalization
    model = NaiveUnet((size, size, 3), n_feat)
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True, ema_momentum=0.99)
    optimizer.build(model.trainable_variables)
    model_file.logbook(model)["progress"] = {}
    parts = options.get("parts", device.parts_for(BATCH))
    model_file.compile_for_run(model, optimizer, precision, options.get("xla", device.has_gpu()), parts)
    images = np.random.default_rng(0).integers(0, 256, (256 * BATCH, size, size, 3), np.uint8)
    noisy = diffusion_model.noising(ddpm_schedule(1e-4, 0.02, 1000), seed=0)
    endless, step = iter(()), 0

    def train_step():
        nonlocal endless, step
        image_batch = next(endless, None)
        if image_batch is None:
            endless = data.batches(images, BATCH, 0, step)
            image_batch = next(endless)
        x_t, t_input, eps = noisy(image_batch, tf.constant(step, tf.int64))
        step += 1
        return model.train_on_batch([x_t, t_input], eps)

    return train_step


def torchs(n_feat, size, precision, layout, fused):
    """The same step in PyTorch."""
    import peer
    import torch

    torch.set_num_threads(common.device.cores())
    layout = getattr(torch, layout)
    network = peer.Unet((size, size, 3), n_feat).to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=fused)
    averages = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    images = torch.randint(0, 256, (256 * BATCH, 3, size, size), dtype=torch.uint8).to(memory_format=layout)
    alphabar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def train_step():
        x_0 = images[torch.randint(0, len(images), (BATCH,))] / 127.5 - 1
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (BATCH,))
        a = alphabar[t][:, None, None, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = torch.nn.functional.mse_loss(network(x_t, (t[:, None] + 1) / 1000), eps)
        loss.backward()
        optimizer.step()
        averages.update_parameters(network)
        return loss.item()

    return train_step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (9)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--n-feat", type=int, help="a width of your own, with --image-size")
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args()
    settings = {"yours": (options.n_feat, options.image_size)} if options.n_feat else SETTINGS
    import peer

    print(common.machine("tensorflow", "keras", "torch"))
    parameters, difference = peer.check()
    print(f"networks: {parameters:,} parameters both; largest difference of outputs {difference:.1e}")
    for title, (n_feat, size) in settings.items():
        p = options.precision
        contenders = {
            "this project": common.Contender(ours, n_feat, size, p, {}),
            "… batches undivided": common.Contender(ours, n_feat, size, p, {"parts": 1}),
            "… with XLA, undivided": common.Contender(ours, n_feat, size, p, {"parts": 1, "xla": True}),
            "Keras as it is": common.Contender(ours, n_feat, size, p, {"parts": 1, "keras_norm": True}),
            "PyTorch": common.Contender(torchs, n_feat, size, p, "contiguous_format", None),
            "PyTorch, channels_last": common.Contender(torchs, n_feat, size, p, "channels_last", None),
            "PyTorch, channels_last, fused Adam": common.Contender(torchs, n_feat, size, p, "channels_last", True),
        }
        seconds = common.race(contenders, options.rounds)
        best = min(seconds["PyTorch"], seconds["PyTorch, channels_last"])
        rows = [("", "ms a step", "images a second", "× PyTorch in its better layout")]
        rows += [(name, f"{1e3 * s:.1f}", f"{BATCH / s:.0f}", f"{best / s:.2f}") for name, s in seconds.items()]
        common.table(f"training, {title}: n_feat {n_feat}, {size}×{size}, batches of {BATCH}, {p}", rows)


if __name__ == "__main__":
    main()

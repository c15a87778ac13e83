"""How fast is one training step, beside Keras as it is and beside PyTorch?

    pip install -r benchmarks/requirements.txt
    python benchmarks/training_step.py                       float32, about 15 minutes on 2 cores
    python benchmarks/training_step.py --network unet        one of the networks
    python benchmarks/training_step.py --precision bfloat16
    python benchmarks/training_step.py --n-feat 512 --batch-size 64 --precision bfloat16        on a GPU

All draw t and ε, noise the images, predict, take one step of Adam and update the EMA weights. First it is checked that
the networks have as many parameters, and with the same weights the same outputs to 1e-4. PyTorch runs eager, in both
memory layouts; with a GPU or a C++ compiler also compiled. The last column is the rate of a step's operations in
percent of the rate of large matrix products, measured in the same run.
"""

import argparse

import common

from support import device

SETTINGS = {  # network, n_feat, image size
    "small": ("naive", 16, 32),
    "larger": ("naive", 32, 64),
    "unet": ("unet", 32, 32),
    "larger unet": ("unet", 64, 64),
}


def ours(network, n_feat, size, batch, precision, options):
    """A step as `diffusion_model.train` does it, with what `device.py` chooses, or with `options` instead."""
    tf = device.start_tensorflow(parts=options.get("parts", device.MOST_PARTS))
    import keras
    import numpy as np

    import data
    import diffusion_model
    from ddpm import ddpm_schedule, from_pixels
    from diffusion import model_file
    from training import checkpoint

    if options.get("keras_norm"):
        import unet

        unet.GroupNormalization = keras.layers.GroupNormalization
    model = common.build(network, size, n_feat)
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True, ema_momentum=0.99)
    optimizer.build(model.trainable_variables)
    model_file.metadata(model)["progress"] = {}
    parts = options.get("parts", device.parts_for(batch))
    how = options.get("xla", device.has_gpu()), parts
    checkpoint.compile_for_run(model, optimizer, precision, *how, sequential=bool(options.get("sequential")))
    images = np.random.default_rng(0).integers(0, 256, (64 * batch, size, size, 3), np.uint8)
    noisy = diffusion_model.noising(ddpm_schedule(1e-4, 0.02, 1000), seed=0)
    endless, step = iter(()), 0

    def train_step():
        nonlocal endless, step
        image_batch, _ = next(endless, (None, None))
        if image_batch is None:
            endless = data.batches(images, batch, 0, step)
            image_batch, _ = next(endless)
        x_t, t_input, target, weight = noisy(from_pixels(image_batch), tf.constant(step, tf.int64))
        step += 1
        return model.train_on_batch([x_t, t_input], target, sample_weight=weight)

    return train_step


def torchs(network, n_feat, size, batch, precision, layout, fused, compiled=False):
    """The same step in PyTorch."""
    import peer
    import torch

    torch.set_num_threads(device.cores())
    layout = getattr(torch, layout)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = peer.build(network, size, n_feat).to(where, memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    averages = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    images = torch.randint(0, 256, (64 * batch, 3, size, size), dtype=torch.uint8).to(memory_format=layout)
    alphabar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(where)
    predict = torch.compile(model) if compiled else model

    def train_step():
        x_0 = images[torch.randint(0, len(images), (batch,))].to(where) / 127.5 - 1
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (batch,), device=where)
        a = alphabar[t][:, None, None, None]
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
        optimizer.zero_grad()
        with torch.autocast(where, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = torch.nn.functional.mse_loss(predict(x_t, (t[:, None] + 1) / 1000), eps)
        loss.backward()
        optimizer.step()
        averages.update_parameters(model)
        return loss.item()

    return train_step


def matrix_width():
    """Width of matrices that are large enough for the highest rate on this machine."""
    return 8192 if device.has_gpu() else 2048


def make_contenders(*setting):
    """All that take a step in a setting: network, n_feat, image size, batch size, precision."""
    import peer

    contenders = {
        "this project": common.Contender(ours, *setting, {}),
        "… batches undivided": common.Contender(ours, *setting, {"parts": 1, "xla": False}),
        "… with XLA, undivided": common.Contender(ours, *setting, {"parts": 1, "xla": True}),
    }
    if setting[0] == "naive":  # Keras' normalization takes no scale and shift of an image
        contenders["Keras as it is"] = common.Contender(ours, *setting, {"parts": 1, "keras_norm": True})
    contenders |= {
        "PyTorch": common.Contender(torchs, *setting, "contiguous_format", None),
        "PyTorch, channels_last": common.Contender(torchs, *setting, "channels_last", None),
        "PyTorch, channels_last, fused Adam": common.Contender(torchs, *setting, "channels_last", True),
    }
    if peer.can_compile():
        compiled = common.Contender(torchs, *setting, "channels_last", True, True)
        contenders["PyTorch, channels_last, fused Adam, compiled"] = compiled
    return contenders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds, each with all contenders (9)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="precision of the layers (float32)"
    )
    parser.add_argument("--network", choices=common.NETWORKS, help="measure only this network (both)")
    parser.add_argument("--n-feat", type=int, help="measure only this width, with --network (naive) and --image-size")
    parser.add_argument("--image-size", type=int, default=64, help="with --n-feat: height and width in pixels (64)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step (16)")
    options = parser.parse_args()
    settings = {title: setting for title, setting in SETTINGS.items() if options.network in (None, setting[0])}
    if options.n_feat:
        settings = {"yours": (options.network or "naive", options.n_feat, options.image_size)}
    import peer

    tf = device.start_tensorflow()
    tf.config.experimental.enable_tensor_float_32_execution(False)  # here, to compare; contenders are other processes
    print(common.machine("tensorflow", "keras", "torch"))
    for network in dict.fromkeys(network for network, *_ in settings.values()):
        parameters, difference = peer.check(common.build(network, 64, 32), peer.build(network, 64, 32))
        print(f"{network}: {parameters:,} parameters both; largest difference of outputs {difference:.1e}")
    for title, (network, n_feat, size) in settings.items():
        setting = network, n_feat, size, options.batch_size, options.precision
        contenders = make_contenders(*setting)
        contenders["matrices"] = common.Contender(common.multiply_matrices, matrix_width(), options.precision)
        seconds = common.race(contenders, options.rounds)
        rate = 2 * matrix_width() ** 3 / seconds.pop("matrices")
        best = min(seconds["PyTorch"], seconds["PyTorch, channels_last"])
        rows = [("", "ms a step", "images a second", "× PyTorch in its better layout", "% of the matrix rate")]
        for name, s in seconds.items():
            percent = 100 * common.operations(*setting[:4]) / s / rate
            rows.append((name, f"{1e3 * s:.1f}", f"{options.batch_size / s:.0f}", f"{best / s:.2f}", f"{percent:.0f}"))
        common.table(
            f"training, {title}: {network}, n_feat {n_feat}, {size}×{size}, batches of {options.batch_size}, "
            f"{options.precision}; matrices {rate / 1e9:.0f} GFLOP/s",
            rows,
        )


if __name__ == "__main__":
    main()

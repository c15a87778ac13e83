"""Trains and samples with denoising-diffusion-pytorch, the peer of recipes.py.

    pip install -r benchmarks/requirements.txt
    python benchmarks/ddpp.py FOLDER --image-size 32 --train 5000 --out samples.npy

The network is the one in its README. Its `Trainer` trains on the images of the folder with its defaults: learning rate
1e-4, batches of 16, images mirrored at random, EMA momentum 0.995; but without FID and sample grids. Checkpoints let an
interrupted run resume. Its DDIM samples with the EMA weights.
"""

import argparse
import os
import statistics

import common
import numpy as np

from support import device, files

EVERY = 250  # steps from one checkpoint to the next


def make(folder, image_size, steps, sampling_steps, results):
    """A trainer with its defaults, for the network of the README."""
    import torch
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    torch.set_num_threads(device.cores())
    model = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(model, image_size=image_size, timesteps=1000, sampling_timesteps=sampling_steps)
    without = {"save_and_sample_every": 10**9, "calculate_fid": False}
    return Trainer(diffusion, folder, train_num_steps=steps, results_folder=results, **without)


def train(trainer, results):
    """Trains to the last step, with checkpoints; resumes from the latest."""
    path = os.path.join(results, "model-0.pt")
    if os.path.exists(path):
        trainer.load(0)
    last = trainer.train_num_steps
    while trainer.step < last:
        trainer.train_num_steps = min(last, trainer.step + EVERY)
        trainer.train()
        trainer.save(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="training images")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS", help="height and width in pixels (32)")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="number of training steps (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of training and of sampling (0)")
    parser.add_argument("--n-sample", type=int, default=1000, metavar="N", help="number of samples (1000)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="number of DDIM steps (50)")
    parser.add_argument(
        "--out", default="samples.npy", metavar="FILE.npy", help="file for the samples, uint8 (samples.npy)"
    )
    parser.add_argument("--time", action="store_true", help="only measure the time of a training step")
    options = parser.parse_args()
    import torch

    torch.manual_seed(options.seed)
    results = os.path.splitext(options.out)[0] + "-ddpp"
    trainer = make(options.folder, options.image_size, options.train, options.steps, results)
    if options.time:

        def train_step():
            trainer.train_num_steps = trainer.step + 1
            trainer.train()

        seconds = common.time_calls(train_step, 30)
        print(f"RESULT {statistics.median(seconds[10:])} {len(trainer.ds)}")
        return
    train(trainer, results)
    torch.manual_seed(options.seed)
    trainer.ema.ema_model.eval()
    batches = []
    with torch.inference_mode():
        for first in range(0, options.n_sample, 50):
            images = trainer.ema.ema_model.sample(batch_size=min(50, options.n_sample - first))
            batches.append((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    files.save_array(np.concatenate(batches), options.out)


if __name__ == "__main__":
    main()

"""Losses in three precisions side by side; gradients on the card against the CPU."""

import common

from gpu_checks import check


def measure_losses(size, precision):
    """The mean loss of each third of some hundred steps on drawings, always with the same images and noise."""
    tf, dtype = common.start_tensorflow(precision)
    import keras
    import numpy as np

    import data
    import diffusion_model
    from ddpm import ddpm_schedule, from_pixels
    from training import checkpoint
    from unet import NaiveUnet

    keras.utils.set_random_seed(0)
    n_feat = min(size.n_feat, 128)
    images, _ = data.load_images("drawings", size.image_size)
    model = NaiveUnet(images.shape[1:], n_feat)
    optimizer = keras.optimizers.Adam(1e-3, use_ema=True)
    optimizer.build(model.trainable_variables)
    checkpoint.compile_for_run(model, optimizer, dtype, bool(tf.config.list_physical_devices("GPU")))
    noisy, losses = diffusion_model.noising(ddpm_schedule(1e-4, 0.02, 1000), 0), []
    while len(losses) < size.steps:
        for image_batch, _ in data.batches(images, size.batch, 0, 0):
            x_t, t_input, target, weight = noisy(from_pixels(image_batch), tf.constant(len(losses), tf.int64))
            losses.append(model.train_on_batch([x_t, t_input], target, sample_weight=weight))
            if len(losses) == size.steps:
                break
    thirds = [float(np.mean(part)) for part in np.array_split(losses, 3)]
    return {f"mean loss, third {k}": round(loss, 4) for k, loss in enumerate(thirds, start=1)}


for precision in "float32", "tf32", "bfloat16":
    check("right", 90, name=f"losses_{precision}", precision=precision)(measure_losses)


@check("right", 60, needs=("tensorflow", "gpu"))
def gradients_against_the_cpu(size):
    """The largest difference of gradients between card and CPU, relative to the largest gradient, in float32."""
    tf, _ = common.start_tensorflow("float32")
    import keras
    import numpy as np

    from diffusion.layers import GroupNormalization
    from unet import NaiveUnet

    keras.utils.set_random_seed(0)
    image, t = keras.Input((32, 32, 3)), keras.Input((1,))
    normalization = keras.Model([image, t], GroupNormalization(8)(keras.layers.Conv2D(16, 1)(image)))
    results = {}
    for name, model in ("GroupNormalization", normalization), ("NaiveUnet", NaiveUnet((32, 32, 3), 32)):
        rng = np.random.default_rng(0)
        model.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in model.get_weights()])
        inputs = [rng.standard_normal((8, 32, 32, 3), np.float32), rng.random((8, 1), np.float32)]
        gradients = []
        for place in "/CPU:0", "/GPU:0":
            with tf.device(place):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(model(inputs, training=True) - 1))
                gradients.append([g.numpy() for g in tape.gradient(loss, model.trainable_variables)])
        scale = max(np.abs(g).max() for g in gradients[0])
        worst = max(np.abs(one - other).max() for one, other in zip(*gradients, strict=True)) / scale
        results[f"{name}, relative difference"] = float(f"{worst:.2e}")
        if worst > 1e-3:
            raise RuntimeError(f"gradients of {name} differ by {worst:.2e}")
    return results

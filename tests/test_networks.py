"""The networks beyond the slides and their layers, against NumPy, Keras' own layers, and TensorFlow's gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_unet import randomized, some_inputs

import unet
from diffusion import layers
from diffusion.networks import Classifier, Unet

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def normalized(x, groups, epsilon=1e-3):
    """Group normalization with neither scale nor shift, float64."""
    grouped = x.astype(np.float64).reshape(*x.shape[:3], groups, -1)
    mean, variance = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)


def convolved(x, layer):
    """A convolution with zeros around the image, float64; a 1×1 one is a product of matrices."""
    kernel, bias = (weight.astype(np.float64) for weight in layer.get_weights())
    size = len(kernel)
    padded = np.pad(x, [(0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)])
    height, width = x.shape[1:3]
    shifted = [padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(size) for j in range(size)]
    return sum(shifted) + bias


def float64_weights(layer):
    return [weight.astype(np.float64) for weight in layer.get_weights()]


def dense(x, layer):
    kernel, *bias = float64_weights(layer)
    return x @ kernel + sum(bias)


def scaled(x, layer):
    """A group normalization with its scale and shift."""
    gamma, beta = float64_weights(layer)
    return gamma * normalized(x, 8) + beta


def residual(x, embedding, block):
    """The block of ADM, in which the embedding scales and shifts the second normalization."""
    h = convolved(silu(scaled(x, block.Norm_1)), block.Conv2D_1)
    scale, shift = np.split(dense(embedding, block.Modulation)[:, None, None], 2, axis=-1)
    h = convolved(silu(scaled(h, block.Norm_2) * (1 + scale) + shift), block.Conv2D_2)
    return h + (convolved(x, block.Skip) if block.Skip.weights else x)


def attended(x, layer, heads=1):
    """Every pixel beside what it attends to, head by head."""
    channels = x.shape[-1]
    pixels = scaled(x, layer.Norm).reshape(len(x), -1, channels)
    query, key, value = np.split(dense(pixels, layer.Projection_in), 3, axis=-1)
    mixed = np.zeros_like(pixels)
    for head in np.split(np.arange(channels), heads):
        logits = query[..., head] @ key[..., head].swapaxes(1, 2) / np.sqrt(len(head))
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed[..., head] = weights / weights.sum(-1, keepdims=True) @ value[..., head]
    return x + dense(mixed, layer.Projection_out).reshape(x.shape)


@pytest.mark.parametrize("channels", [16, 24])
def test_a_residual_block_computes_what_adm_does(channels):
    x, embedding = random(2, 4, 6, channels), random(2, 5)
    block = layers.ResidualBlock(16)
    np.testing.assert_allclose(block([x, embedding]), x if channels == 16 else block.Skip(x), atol=1e-6)  # as it begins
    block.set_weights([random(*weight.shape) for weight in block.get_weights()])
    assert bool(block.Skip.weights) == (channels != 16)
    expected = residual(x, embedding, block)
    np.testing.assert_allclose(block([x, embedding]), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("mixed_bfloat16", 0.02)])
def test_modulation_has_the_gradients_of_its_formula(precision, tolerance, silu):
    x, modulation, direction = random(3, 4, 4, 24), random(3, 48), random(3, 4, 4, 24)
    ours = layers.GroupNormalization(8, dtype=precision)
    keras_layer = keras.layers.GroupNormalization(8)
    results = []
    for layer in ours, keras_layer:
        layer.build(x.shape)
        layer.set_weights([np.linspace(-1, 2, 24), np.linspace(3, -2, 24)])
        inputs = tf.Variable(x), tf.Variable(modulation)
        with tf.GradientTape() as tape:
            if layer is ours:
                y = layer(*inputs, silu=silu)
            else:
                scale, shift = tf.split(inputs[1][:, None, None], 2, axis=-1)
                y = layer(inputs[0]) * (1 + scale) + shift
                y = y * tf.sigmoid(y) if silu else y
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * direction)
        results.append([y, *tape.gradient(loss, [*inputs, *layer.trainable_variables])])
    for got, expected in zip(*results, strict=True):
        got, expected = np.asarray(tf.cast(got, tf.float32)), np.asarray(expected)
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("channels, heads", [(16, 1), (32, 1), (64, 2), (96, 3), (112, 2), (176, 4), (232, 4)])
def test_attention_is_the_formula_head_by_head(channels, heads):
    x, layer = random(2, 3, 4, channels), layers.SelfAttention()
    np.testing.assert_array_equal(layer(x), x)  # as it begins
    layer.set_weights([random(*weight.shape) / 4 for weight in layer.get_weights()])
    expected = attended(x, layer, heads)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4 * np.abs(expected).max())


def test_attention_leaves_the_images_of_a_batch_apart():
    """111·112 is a multiple of three heads of 37 channels, into which 112 do not divide."""
    layer, x = layers.SelfAttention(), random(111, 2, 2, 112)
    layer(x[:1])
    layer.set_weights([random(*weight.shape) for weight in layer.get_weights()])
    changed = x.copy()
    changed[50] += 1
    differs = np.any(np.asarray(layer(x)) != np.asarray(layer(changed)), axis=(1, 2, 3))
    np.testing.assert_array_equal(np.flatnonzero(differs), [50])


@pytest.mark.parametrize("n_feat", [8, 56, 88])
def test_every_allowed_width_can_be_built(n_feat):
    """Rows of a batch stay apart in all of them; here where patches, levels and attention meet."""
    x, t = some_inputs((8, 8, 3))
    for model in Unet((8, 8, 3), n_feat, widths=(1, 3), patch=2), Classifier((8, 8, 3), n_feat, 4, widths=(3,)):
        assert len(model([x, t])) == len(x)


@pytest.mark.parametrize(
    "layer, shape", [(layers.SpaceToDepth(2), (4, 5, 3, 4)), (layers.DepthToSpace(2), (4, 2, 2, 6))]
)
def test_images_that_do_not_divide_into_patches_are_refused(layer, shape):
    """A batch of four could absorb the rest."""
    with pytest.raises(Exception, match="[Rr]eshape|shape"):
        layer(random(*shape))


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_become_channels_and_pixels_again(patch):
    x = random(2, 8, 4, 3)
    deep = np.asarray(layers.SpaceToDepth(patch)(x))
    for row in range(patch):
        for column in range(patch):
            first = 3 * (row * patch + column)
            np.testing.assert_array_equal(deep[..., first : first + 3], x[:, row::patch, column::patch])
    np.testing.assert_array_equal(layers.DepthToSpace(patch)(deep), x)


def test_every_class_and_no_class_has_an_embedding_of_its_own():
    layer = layers.ClassLayer(2, 5)
    embeddings = np.asarray(layer(np.array([[0], [1], [2], [1]], np.int32)))
    np.testing.assert_array_equal(embeddings, layer.get_weights()[0][[0, 1, 2, 1]])
    assert len(np.unique(embeddings, axis=0)) == 3


@pytest.mark.parametrize(
    "layer, inputs",
    [
        (layers.ResidualBlock(16), [(2, 4, 4, 8), (2, 5)]),
        (layers.SelfAttention(head=8), [(2, 4, 4, 16)]),
        (layers.SpaceToDepth(2), [(2, 4, 4, 3)]),
        (layers.DepthToSpace(2), [(2, 4, 4, 12)]),
    ],
)
def test_layers_survive_their_config(layer, inputs):
    arrays = [random(*shape) for shape in inputs]
    arrays = arrays if len(arrays) > 1 else arrays[0]
    layer(arrays)
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(twin) is type(layer) and twin.get_config() == layer.get_config()
    twin(arrays)
    twin.set_weights(layer.get_weights())
    np.testing.assert_array_equal(twin(arrays), layer(arrays))


SHAPES = [((16, 8, 3), {"patch": 2}), ((8, 8, 1), {"widths": (1, 3), "attention": 0, "blocks": 2}), ((8, 8, 3), {})]


@pytest.mark.parametrize("shape, how", SHAPES)
def test_networks_have_the_shapes_of_images_and_classes(shape, how):
    inputs = some_inputs(shape)
    unconditional, classifier = Unet(shape, 8, **how), Classifier(shape, 8, 4, **how)
    assert not np.any(unconditional(inputs)) and unconditional(inputs).shape == (2, *shape)
    assert not np.any(classifier(inputs)) and classifier(inputs).shape == (2, 4)


def to_patches(x, size):
    """The pixels of each patch one after the other, as channels."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(n, height // size, width // size, size**2 * channels)


def to_pixels(x, size):
    """The inverse of `to_patches`."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height, width, size, size, channels // size**2).swapaxes(2, 3)
    return x.reshape(n, size * height, size * width, channels // size**2)


def computed_by_hand(model, inputs, widths, blocks, attention, patch):
    """A `Unet` or a `Classifier`, from the layers of each kind in their order."""
    found = {kind: iter([layer for layer in model.layers if type(layer) is kind]) for kind in map(type, model.layers)}
    levels = range(len(widths))
    image, t, *label = (array.astype(np.float64) for array in inputs)

    def convolve(x):
        return convolved(x, next(found[keras.layers.Conv2D]))

    def normalize(x):
        return silu(scaled(x, next(found[layers.GroupNormalization])))

    def block(x):
        return residual(x, embedding, next(found[layers.ResidualBlock]))

    def block_at(level, x):
        lowest = levels[len(levels) - attention :]
        return attended(block(x), next(found[layers.SelfAttention])) if level in lowest else block(x)

    time = next(found[unet.TimeLayer])
    embedding = dense(np.sin(dense(t, time.Dense_1)), time.Dense_2)
    for classes in label:
        embedding = embedding + float64_weights(next(found[layers.ClassLayer]))[0][classes[:, 0].astype(int)]
    embedding = silu(embedding)

    x, skips = convolve(to_patches(image, patch)), []
    for level in levels:
        if level:
            x = sum(x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
        for _ in range(blocks):
            x = block_at(level, x)
            skips.append(x)
    if len(model.output_shape) == 2:
        return dense(normalize(x).mean((1, 2)), model.layers[-1])

    x = block(x)
    for level in reversed(levels):
        for _ in range(blocks):
            x = block_at(level, np.concatenate([x, skips.pop()], axis=-1))
        x = x.repeat(2, axis=1).repeat(2, axis=2) if level else x
    x = normalize(x)
    if patch > 1:
        x = np.concatenate([to_pixels(convolve(x), patch), convolve(image)], axis=-1)
        x = normalize(block(x))
    return convolve(x)


TWO_LEVELS = {"widths": (1, 2), "blocks": 2, "attention": 1, "patch": 1}
THREE_LEVELS = {"widths": (1, 1, 2), "blocks": 1, "attention": 2, "patch": 2}


@pytest.mark.parametrize(
    "network, more, how, outputs",
    [
        (Unet, {"classes": 2, "learn_variance": True}, TWO_LEVELS, (16, 8, 6)),
        (Unet, {}, THREE_LEVELS, (16, 8, 3)),
        (Classifier, {"classes": 4}, THREE_LEVELS, (4,)),
    ],
)
def test_networks_compute_what_numpy_does(network, more, how, outputs):
    """Files of every version rest on this: the order of the layers, what they join, and where attention begins."""
    model = randomized(network((16, 8, 3), 16, **more, **how))
    inputs = [*some_inputs((16, 8, 3)), np.array([[0], [2]], np.int32)][: len(model.inputs)]
    expected = computed_by_hand(model, inputs, **how)
    assert expected.shape == (2, *outputs)
    np.testing.assert_allclose(model(inputs), expected, atol=1e-4 * expected.std())


def test_every_input_and_every_weight_reaches_the_output():
    """An input or a weight that changes nothing would be a broken connection."""
    model = randomized(Unet((8, 8, 3), 16, classes=2, widths=(1, 2), patch=2))
    inputs = [*some_inputs((8, 8, 3)), np.array([[1], [2]], np.int32)]
    predict = tf.function(model)
    before = predict(inputs).numpy()
    for changed in [inputs[0] + 1, *inputs[1:]], [inputs[0], inputs[1] / 2, inputs[2]], [*inputs[:2], inputs[2] - 1]:
        assert np.any(predict(changed).numpy() != before)
    for weight in model.trainable_variables:
        value = weight.numpy()
        weight.assign(value + 0.5 * np.random.default_rng(2).standard_normal(value.shape))
        assert np.any(predict(inputs).numpy() != before), weight.path
        weight.assign(value)


def test_the_slides_network_takes_the_class_where_time_enters():
    model = randomized(unet.NaiveUnet((32, 32, 3), 8, classes=2))
    assert model.count_params() == unet.NaiveUnet((32, 32, 3), 8).count_params() + 3 * 16
    image, t = (np.repeat(values[:1], 3, axis=0) for values in some_inputs((32, 32, 3)))
    out = np.asarray(model([image, t, np.array([[0], [1], [2]], np.int32)]))
    assert len(np.unique(out.reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize(
    "how, message",
    [
        ({"n_feat": 12}, "multiple of 8"),
        ({"widths": ()}, "one for each level"),
        ({"widths": (1, 0)}, "at least 1"),
        ({"blocks": 0}, "blocks must be an integer from 1"),
        ({"attention": 4}, "attention must be an integer from 0 to 3"),
        ({"patch": 3}, "1, 2 or 4"),
        ({"patch": 4, "input_shape": (24, 24, 3)}, "multiples of 16.*24×24"),
        ({"input_shape": (0, 0, 3)}, "multiples of 4"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_limits(how, message):
    for network in Unet, Classifier:
        with pytest.raises(ValueError, match=message):
            network(**{"input_shape": (16, 16, 3), "n_feat": 8, "classes": 2, **how})


def test_upsampling_does_not_use_the_operation_tile():
    """Its gradient transposes integers, of which oneDNN says on stderr that it cannot: "supports DT_INT32 only …"."""
    model = Unet((16, 16, 3), 8, patch=2)
    signature = [tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype) for tensor in model.inputs]
    graph = tf.function(lambda *inputs: model(list(inputs)), autograph=False).get_concrete_function(*signature).graph
    assert "Tile" not in {node.type for node in graph.get_operations()}

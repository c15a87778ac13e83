"""Guidance towards a class, with exact predictors and classifiers of a mixture of two Gaussians, and `my_sample`."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import Oracle

import reverse_diffusion as rd
from ddpm import n_steps
from diffusion import generate, model_file, sampling
from diffusion.denoiser import autoguided, classifier_free, denoiser, with_classifier
from diffusion.layers import Logbook
from diffusion.model_file import TrainedModel
from diffusion.options import Sampling
from diffusion.reverse import ReverseSteps
from diffusion.schedules import make_schedule

WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-0.5, 0.4]), np.array([0.1, 0.2])
SCHED = make_schedule(T=200, schedule="cosine")
SHAPE = (1, 1, 1)


def in_float64(x_t, ab):
    """ε_c for both classes, ε_∅, and log p(c, x_t) of both, (…, 2), (…), (…, 2): the mixture with noise on it."""
    mean, variance = np.sqrt(ab) * MEANS, ab * STDS**2 + 1 - ab
    x = np.asarray(x_t, np.float64)[..., None]
    joint = np.log(WEIGHTS) - 0.5 * (x - mean) ** 2 / variance - 0.5 * np.log(variance)
    eps = np.sqrt(1 - ab) * (x - mean) / variance
    posterior = np.exp(joint - joint.max(-1, keepdims=True))
    posterior /= posterior.sum(-1, keepdims=True)
    return eps, (posterior * eps).sum(-1), joint


def mixture(t_over_T):
    """ᾱ_t, mean and variance of both classes, (batch, 1), (batch, 2), (batch, 2), as tensors."""
    t = tf.cast(tf.round(t_over_T * n_steps(SCHED)), tf.int32)
    ab = tf.gather(tf.constant(SCHED.alphabar, tf.float32), t)
    return ab, tf.sqrt(ab) * MEANS.astype(np.float32), ab * (STDS**2).astype(np.float32) + 1 - ab


def classify(inputs, training=False):
    """log p(c, x_t), which is log p(c | x_t) up to a constant."""
    x_t, t = inputs[:2]
    _, mean, variance = mixture(t)
    return (
        tf.math.log(WEIGHTS.astype(np.float32))
        - 0.5 * (x_t[:, 0, 0] - mean) ** 2 / variance
        - 0.5 * tf.math.log(variance)
    )


def predict(inputs, training=False):
    """ε of a class, or ε_∅ for the label 0."""
    x_t, t, label = inputs
    ab, mean, variance = mixture(t)
    eps = tf.sqrt(1 - ab) * (x_t[:, 0, 0] - mean) / variance
    without_class = tf.reduce_sum(tf.nn.softmax(classify(inputs)) * eps, axis=-1, keepdims=True)
    return tf.gather(tf.concat([without_class, eps], axis=-1), label, batch_dims=1)[:, :, None, None]


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 2.0, 7.5, -1.0])
@pytest.mark.parametrize("c", [0, 1])
def test_both_guidances_are_the_formula_at_every_x_and_t(g, c):
    x_t, t = (values.ravel() for values in np.meshgrid(np.linspace(-2, 2, 21), np.arange(1, 201)))
    expected = []
    for x, step in zip(x_t, t, strict=True):
        eps, without_class, _ = in_float64(x, SCHED.alphabar[step])
        expected.append(without_class + g * (eps[c] - without_class))
    expected = np.array(expected)
    inputs = tf.constant(x_t[:, None, None, None], tf.float32), tf.constant(t, tf.int32), tf.fill(len(t), c + 1)
    denoise, strength = denoiser(predict, SCHED), tf.constant(g)
    unlabelled = denoiser(lambda two: predict([*two, tf.zeros((len(t), 1), tf.int32)]), SCHED)
    for guided in classifier_free(denoise, strength), with_classifier(unlabelled, classify, SCHED, strength):
        x_0, eps = (part.numpy().ravel() for part in guided(*inputs)[:2])
        np.testing.assert_allclose(eps, expected, rtol=1e-3, atol=1e-3)
        sqrtab, sqrtmab = SCHED["sqrtab"][t], SCHED["sqrtmab"][t]
        np.testing.assert_allclose(sqrtab * x_0 + sqrtmab * eps, x_t, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def reverse_steps():
    """Guided by the network itself, and by a classifier, 64 images each."""
    network = TrainedModel(Oracle(predict, SHAPE, labels=True), SCHED)
    classifier = TrainedModel(Oracle(classify, SHAPE), SCHED)
    return [ReverseSteps(network, 64, clip=False, xla=False, classifier=guide) for guide in (None, classifier)]


def by_hand(x_t, g, c, first=0, last=10**6, clip=False):
    """DDIM without noise, all steps, float64; what is clipped is the guided estimate."""
    ab = SCHED.alphabar
    for t in range(n_steps(SCHED), 0, -1):
        eps, without_class, _ = in_float64(x_t, ab[t])
        eps = without_class + (g if first <= t <= last else 1) * (eps[..., c] - without_class)
        x_0 = (x_t - np.sqrt(1 - ab[t]) * eps) / np.sqrt(ab[t])
        if clip:
            x_0 = np.clip(x_0, -1, 1)
            eps = (x_t - np.sqrt(ab[t]) * x_0) / np.sqrt(1 - ab[t])
        x_t = np.sqrt(ab[t - 1]) * x_0 + np.sqrt(1 - ab[t - 1]) * eps
    return x_t


@pytest.mark.parametrize("g, interval", [(0.0, None), (1.0, None), (2.0, None), (4.0, (50, 120))])
def test_guided_samples_match_the_process_in_float64(reverse_steps, g, interval):
    """From the same noise; the two halves of the batch ask for different classes, in one trace for all g."""
    label = np.repeat([1, 2], 32)
    start = np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float32)
    plan = sampling.make_plan(SCHED, Sampling("ddim", label=0, guidance=g, guidance_interval=interval))
    halves = [by_hand(start[label == c + 1].ravel().astype(np.float64), g, c, *(interval or ())) for c in (0, 1)]
    for steps in reverse_steps:
        *_, (_, x_0) = sampling.sample(steps, plan, 0, range(64), tf.constant(start), label=label)
        np.testing.assert_allclose(x_0.numpy().ravel(), np.concatenate(halves), atol=2e-3)
        assert steps._take.experimental_get_tracing_count() == 1


def test_clipping_applies_to_the_guided_estimate():
    start = np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float32)
    steps = ReverseSteps(TrainedModel(Oracle(predict, SHAPE, labels=True), SCHED), 64, xla=False)
    plan = sampling.make_plan(SCHED, Sampling("ddim", label=0, guidance=8.0))
    *_, (_, x_0) = sampling.sample(steps, plan, 0, range(64), tf.constant(start), label=[2] * 64)
    expected = by_hand(start.ravel().astype(np.float64), 8.0, 1, clip=True)
    np.testing.assert_allclose(x_0.numpy().ravel(), expected, atol=2e-3)
    assert np.abs(expected - by_hand(start.ravel().astype(np.float64), 8.0, 1)).max() > 0.01


def test_guidance_interval_includes_its_first_and_last_t():
    plan = sampling.make_plan(SCHED, Sampling("ddim", label=0, guidance=3.0, guidance_interval=(50, 120)))
    t = plan.times[:-1]
    np.testing.assert_array_equal(plan.guidance, np.where((t == 50) | (t == 120) | ((t > 50) & (t < 120)), 3, 1))


def test_classifier_adds_nothing_at_zero_snr():
    sched = make_schedule(T=20, zero_snr=True)
    x_t, t = tf.random.stateless_normal((2, 1, 1, 1), (0, 0)), tf.constant([20, 10])
    denoise = denoiser(lambda inputs: 0.5 * inputs[0], sched, "v")
    guided = with_classifier(denoise, lambda inputs: 3 * inputs[0][:, 0, 0] * [1.0, -1.0], sched, tf.constant(5.0))
    (x_0, eps, _), (plain_x_0, plain_eps, _) = guided(x_t, t, tf.constant([1, 1])), denoise(x_t, t)
    assert x_0[0] == plain_x_0[0] and eps[0] == plain_eps[0] and x_0[1] > plain_x_0[1] and eps[1] < plain_eps[1]


def test_samples_with_guidance_1_follow_their_class(reverse_steps):
    plan = sampling.make_plan(SCHED, Sampling("dpm++", 100))
    for steps, c in itertools.product(reverse_steps, (0, 1)):
        ends = [
            list(sampling.sample(steps, plan, seed, range(64), label=np.full(64, c + 1)))[-1][1] for seed in range(8)
        ]
        x_0 = np.concatenate(ends).ravel()
        assert abs(x_0.mean() - MEANS[c]) < 4 * STDS[c] / np.sqrt(len(x_0)) + 0.005
        assert x_0.std() == pytest.approx(STDS[c], rel=0.15)


def test_network_is_called_once_with_guidance_0_or_1():
    sizes = []

    def counting(inputs, training=False):
        tf.py_function(lambda x_t: sizes.append(len(x_t)), [inputs[0]], [])
        return predict(inputs)

    steps = ReverseSteps(TrainedModel(Oracle(counting, SHAPE, labels=True), SCHED), 4, xla=False)
    for g, images in (0.0, 4), (1.0, 4), (2.0, 8):
        sizes.clear()
        plan = sampling.make_plan(SCHED, Sampling("ddim", 5, label=0, guidance=g))
        list(sampling.sample(steps, plan, 0, range(4), label=[1] * 4))
        assert sum(sizes) == 5 * images


def gaussian(mean, std):
    """A predictor of ε that knows one Gaussian, exact."""

    def predict_eps(inputs, training=False):
        x_t, t = inputs[:2]
        ab, *_ = (values[:, :, None, None] for values in mixture(t))
        return tf.sqrt(1 - ab) * (x_t - tf.sqrt(ab) * mean) / (ab * std**2 + 1 - ab)

    return predict_eps


@pytest.mark.parametrize("g", [-1.0, 0.0, 1.0, 1.5, 2.0])
def test_autoguidance_is_the_formula_for_different_targets(g):
    x_t, t = (values.ravel() for values in np.meshgrid(np.linspace(-2, 2, 21), np.arange(1, 201)))
    ab = SCHED.alphabar[t]
    good, bad = (
        np.sqrt(1 - ab) * (x_t - np.sqrt(ab) * mean) / (ab * std**2 + 1 - ab) for mean, std in ((0.3, 0.2), (0.1, 0.5))
    )

    def image_of(inputs, training=False):  # the weaker network predicts x_0
        ab, *_ = (values[:, :, None, None] for values in mixture(inputs[1]))
        return (inputs[0] - tf.sqrt(1 - ab) * gaussian(0.1, 0.5)(inputs)) / tf.sqrt(ab)

    guided = autoguided(denoiser(gaussian(0.3, 0.2), SCHED), denoiser(image_of, SCHED, "x0"), tf.constant(g))
    x_0, eps, _ = guided(tf.constant(x_t[:, None, None, None], tf.float32), tf.constant(t, tf.int32))
    expected = bad + g * (good - bad)
    np.testing.assert_allclose(eps.numpy().ravel(), expected, rtol=1e-3, atol=2e-3)
    expected_x_0 = (x_t - np.sqrt(1 - ab) * expected) / np.sqrt(ab)
    np.testing.assert_allclose(x_0.numpy().ravel(), expected_x_0, rtol=1e-3, atol=1e-3 * np.abs(expected_x_0).max())


def test_autoguidance_sharpens_an_overestimated_gaussian():
    """Images with σ = 0.2; networks that believe 0.25 and 0.4. Beside DDIM in float64."""
    start = np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float32)
    weaker = TrainedModel(Oracle(gaussian(0.3, 0.4), SHAPE), SCHED)
    steps = ReverseSteps(
        TrainedModel(Oracle(gaussian(0.3, 0.25), SHAPE), SCHED), 64, clip=False, xla=False, weaker=weaker
    )
    spreads = []
    for g in 1.0, 2.0:
        plan = sampling.make_plan(SCHED, Sampling("ddim", label=0, guidance=g))
        *_, (_, x_0) = sampling.sample(steps, plan, 0, range(64), tf.constant(start))
        x_t, ab = start.ravel().astype(np.float64), SCHED.alphabar
        for now in range(n_steps(SCHED), 0, -1):
            good, bad = (
                np.sqrt(1 - ab[now]) * (x_t - np.sqrt(ab[now]) * 0.3) / (ab[now] * std**2 + 1 - ab[now])
                for std in (0.25, 0.4)
            )
            eps = bad + g * (good - bad)
            x_t = np.sqrt(ab[now - 1] / ab[now]) * (x_t - np.sqrt(1 - ab[now]) * eps) + np.sqrt(1 - ab[now - 1]) * eps
        np.testing.assert_allclose(x_0.numpy().ravel(), x_t, atol=2e-3)
        spreads.append(x_t.std() / start.std())
    assert spreads[0] > 0.23 and spreads[1] < 0.2
    assert steps._take.experimental_get_tracing_count() == 1


def test_the_weaker_network_is_not_asked_where_guidance_is_1():
    asked = []

    def counting(inputs, training=False):
        tf.py_function(lambda t: asked.append(round(float(t[0, 0]) * n_steps(SCHED))), [inputs[1]], [])
        return gaussian(0.3, 0.4)(inputs)

    weaker = TrainedModel(Oracle(counting, SHAPE), SCHED)
    steps = ReverseSteps(TrainedModel(Oracle(gaussian(0.3, 0.25), SHAPE), SCHED), 4, xla=False, weaker=weaker)
    plan = sampling.make_plan(SCHED, Sampling("ddim", 10, label=0, guidance=2.0, guidance_interval=(50, 120)))
    list(sampling.sample(steps, plan, 0, range(4)))
    assert list(dict.fromkeys(asked)) == [t for t in plan.times[:-1] if 50 <= t <= 120]


def test_a_weaker_model_guides_my_sample_and_must_fit_the_model(cats_and_dogs):
    """Predictors of constants: where one is twice the other, guidance 3 is four times the weaker one."""
    how = {"n_sample": 2, "seed": 0, "steps": 5, "clip": False, "verbose": 0}
    model, weaker = unconditional(0.02), unconditional(0.01)
    guided = rd.my_sample(model=model, weaker=weaker, guidance=3, **how)
    np.testing.assert_array_equal(guided, rd.my_sample(model=unconditional(0.04), **how))
    assert np.any(guided != rd.my_sample(model=model, **how))
    labelled = rd.my_sample(model=cats_and_dogs, weaker=weaker, label="dog", guidance=0, **how)
    np.testing.assert_array_equal(labelled, rd.my_sample(model=weaker, **how))
    for wrong, message in (
        ({"weaker": weaker}, "weaker has no effect with guidance 1"),
        ({"weaker": unconditional(0.1, T=10), "guidance": 2}, "another noise schedule"),
        ({"weaker": unconditional(0.1, beta2=0.4), "guidance": 2}, "another noise schedule"),
        ({"weaker": classifier_of(), "guidance": 2}, "is a classifier"),
        ({"weaker": weaker, "classifier": classifier_of(), "label": 0}, "choose one"),
        ({"weaker": "none.keras", "guidance": 2}, "there is no model .*none.keras"),
        ({"weaker": 7, "guidance": 2}, "weaker must be a path, or a Keras model"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            rd.my_sample(model=model, **how, **wrong)


@pytest.mark.parametrize("how", ["itself", "a copy"])
def test_a_model_is_not_weaker_than_itself(cats_and_dogs, how):
    weaker = cats_and_dogs if how == "itself" else conditional(CONSTANTS, ["cat", "dog"])
    with pytest.raises(ValueError, match="is the same as the model that it would guide, so it has no effect"):
        rd.my_sample(model=cats_and_dogs, weaker=weaker, guidance=2, verbose=0)


def test_autoguidance_follows_the_label_and_each_models_target():
    how = {"n_sample": 2, "seed": 0, "steps": 5, "clip": False, "verbose": 0}
    one, two, four = (conditional([k * c for c in CONSTANTS], ["cat", "dog"]) for k in (0.02, 0.04, 0.08))
    for label in "cat", "dog":
        guided = rd.my_sample(model=two, weaker=one, guidance=3, label=label, **how)
        np.testing.assert_array_equal(guided, rd.my_sample(model=four, label=label, **how))
    with pytest.raises(ValueError, match="classes dog, cat, this model with cat, dog"):
        rd.my_sample(model=two, weaker=conditional(CONSTANTS, ["dog", "cat"]), guidance=3, label="cat", **how)
    with pytest.raises(ValueError, match="classes cat, this model"):
        rd.my_sample(model=two, weaker=conditional(CONSTANTS[:2], ["cat"]), guidance=3, label="cat", **how)
    for targets in ("eps", "x0"), ("v", "eps"):
        model, weaker = (unconditional(0.1, target=target) for target in targets)
        guided = rd.my_sample(model=model, weaker=weaker, guidance=0, **how)
        np.testing.assert_array_equal(guided, rd.my_sample(model=weaker, **how))
        assert np.any(guided != rd.my_sample(model=model, **how))


def conditional(constants, names=None, T=20):
    """ε̂ = x_t / 2 + a constant for each label, 0 included; with `names` the model carries metadata."""
    image, t, label = keras.Input((2, 2, 1)), keras.Input((1,)), keras.Input((1,), dtype="int32")
    entries = {"diffusion": {"beta1": 1e-3, "beta2": 0.5, "T": T}, "classes": names}
    t_image = keras.layers.Reshape((1, 1, 1))(Logbook(entries if names else {})(t))
    embedding = keras.layers.Embedding(len(constants), 1)
    added = keras.layers.Reshape((1, 1, 1))(embedding(label))
    eps = keras.layers.Add()([keras.layers.Rescaling(0.5)(image), added, keras.layers.Rescaling(0.0)(t_image)])
    embedding.set_weights([np.array(constants)[:, None]])
    return keras.Model([image, t, label], eps)


def unconditional(constant, T=20, target="eps", beta2=0.5):
    image, t = keras.Input((2, 2, 1)), keras.Input((1,))
    entries = {"diffusion": {"beta1": 1e-3, "beta2": beta2, "T": T, "target": target}}
    t_image = keras.layers.Reshape((1, 1, 1))(Logbook(entries)(t))
    eps = keras.layers.Add()([keras.layers.Rescaling(0.5, constant)(image), keras.layers.Rescaling(0.0)(t_image)])
    return keras.Model([image, t], eps)


CONSTANTS = 0.1, 0.4, -0.5


@pytest.fixture(scope="module")
def cats_and_dogs():
    return conditional(CONSTANTS, ["cat", "dog"])


def test_labels_reach_the_network_as_they_are_meant(cats_and_dogs):
    """Names and numbers from 0 say the same, every image has its own, and no class shares the number of "no class"."""
    how = {"n_sample": 3, "seed": 5, "verbose": 0, "clip": False}
    expected = [rd.my_sample(model=unconditional(constant), **how) for constant in CONSTANTS]
    assert len({images.tobytes() for images in expected}) == 3

    def sampled(**more):
        return rd.my_sample(model=cats_and_dogs, **how, **more)

    np.testing.assert_array_equal(sampled(), expected[0])
    for k, name in enumerate(["cat", "dog"]):
        for label in name, k, np.int64(k), [name] * 3, np.full(3, k):
            np.testing.assert_array_equal(sampled(label=label), expected[k + 1])
    mixed = sampled(label=["dog", 0, "dog"])
    for image, constant in enumerate((2, 1, 2)):
        np.testing.assert_array_equal(mixed[image], expected[constant][image])
    np.testing.assert_array_equal(sampled(label="dog", guidance=0), expected[0])
    guided = rd.my_sample(model=unconditional(CONSTANTS[0] + 2 * (CONSTANTS[2] - CONSTANTS[0])), **how)
    assert np.abs(sampled(label="dog", guidance=2) - guided).max() <= 1


def test_every_image_has_its_label_also_in_later_batches(cats_and_dogs):
    label = np.random.default_rng(0).integers(0, 2, 70)
    how = {"n_sample": 70, "seed": 5, "steps": 2, "verbose": 0}
    mixed = rd.my_sample(model=cats_and_dogs, label=label, **how)
    for k in 0, 1:
        expected = rd.my_sample(model=cats_and_dogs, label=k, **how)
        np.testing.assert_array_equal(mixed[label == k], expected[label == k])


def test_a_model_without_metadata_takes_numbers_only():
    model = conditional(CONSTANTS)
    assert rd.my_sample(model=model, label=1, steps=2, seed=0, verbose=0).shape == (1, 2, 2, 1)
    with pytest.raises(ValueError, match="by number only"):
        rd.my_sample(model=model, label="cat", steps=2, verbose=0)
    with pytest.raises(ValueError, match="got 1000000000000"):
        rd.my_sample(model=model, label=10**12, steps=2, verbose=0)


@pytest.mark.parametrize(
    "names, label, number",
    [
        (["1", "2", "3"], [0, 1, 2], [0, 1, 2]),  # folders called so
        (["1", "2", "3"], ["1", "2", "3"], [0, 1, 2]),
        (["0", "1", "10", "2"], [2, "2", np.int64(3), np.str_("10")], [2, 3, 3, 2]),
        (["cat", "dog"], 1, [1]),
    ],
)
def test_labels_are_positions_if_integers_and_names_if_text(names, label, number):
    count = len(label) if isinstance(label, list) else 1
    model = model_file.describe(conditional((0,) * 9, names))
    np.testing.assert_array_equal(generate.as_labels(label, count, model), np.add(number, 1))


def test_labels_that_are_text_are_never_positions():
    with pytest.raises(ValueError, match="no class '1'; the classes are cat, dog"):
        generate.class_number("1", ["cat", "dog"], 2)


@pytest.mark.parametrize(
    "names, word, label, said",
    [
        (["1", "2", "3"], "1", 0, "--label 1 means the class named 1, which is number 0"),
        (["1", "2", "3"], "0", 0, "--label 0 means class number 0, 1"),
        (["cat", "dog"], "1", 1, "--label 1 means class number 1, dog"),
        (["cat", "dog"], "dog", "dog", ""),
        (["cat", "dog"], "2", 2, ""),  # which `my_sample` refuses
        (None, "7", 7, ""),
    ],
)
def test_typed_digits_are_a_name_first_and_it_is_said(names, word, label, said):
    assert generate.read_label(word, names) == (label, said or None)


def test_the_script_takes_labels_of_the_classifier_that_guides(tmp_path):
    conditional(CONSTANTS, ["cat", "dog"]).save(tmp_path / "m.keras")
    unconditional(0.1).save(tmp_path / "u.keras")
    classifier_of(names=("2", "1")).save(tmp_path / "c.keras")
    model, other, guide = (str(tmp_path / name) for name in ("m.keras", "u.keras", "c.keras"))
    assert generate.read_labels(["dog", "0"], model, None)[0] == ["dog", 0]
    assert generate.read_labels(["1"], other, guide) == (1, ["--label 1 means the class named 1, which is number 1"])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"label": "bird"}, "no class 'bird'; the classes are cat, dog"),
        ({"label": 2}, r"from 0 to 1 \(cat, dog\), got 2"),
        ({"label": -1}, "got -1"),
        ({"label": 0.5}, "name or the number of a class, got 0.5"),
        ({"label": True}, "got True"),
        ({"label": [0, 1, 0]}, "each of the 2 images, got 3"),
        ({"label": 0, "guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"label": 0, "guidance": 1e39}, "guidance must be a finite number, got 1e.39"),
        ({"label": 0, "guidance": float("inf")}, "finite"),
        ({"guidance": 2.0}, "has no effect without a label"),
        ({"label": 0, "guidance": 2, "guidance_interval": (9, 3)}, "guidance_interval must be"),
        ({"label": 0, "guidance": 2, "guidance_interval": 7}, "guidance_interval must be"),
        (
            {"label": 0, "guidance": 2, "guidance_interval": (0, 1)},
            r"t from 1 to 20, .*not fractions of T, got \(0, 1\)",
        ),
        ({"label": 0, "guidance": 2, "guidance_interval": (0.2, 0.8)}, "not fractions"),
        ({"label": 0, "guidance_interval": (3, 9)}, "guidance_interval has no effect with guidance 1"),
        ({"snr": 0.1}, "snr sets the size of the corrector's steps, and corrector is 0"),
        ({"sampler": "langevin", "steps": 10, "snr": 0.1}, "corrector is 0"),
        ({"sampler": "ddim", "variance": "beta"}, "variance applies only to sampler ddpm, and the sampler is ddim"),
        (
            {"label": 0, "guidance": 2, "steps": 2, "guidance_interval": (3, 7)},
            r"no step .* \(3, 7\); choose a wider one within 1 to 20",
        ),
        ({"label": 0, "classifier": "none.keras"}, "there is no model .*none.keras"),
    ],
)
def test_wrong_labels_and_guidance_get_one_sentence(cats_and_dogs, wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rd.my_sample(model=cats_and_dogs, n_sample=2, verbose=0, **wrong)


@pytest.mark.parametrize("n_sample", [1, 2, 3])
def test_a_classifier_guides_any_number_of_images(n_sample):
    how = {"model": unconditional(0.1), "seed": 0, "steps": 3, "verbose": 0}
    towards = [
        rd.my_sample(n_sample=n_sample, classifier=classifier_of(), label=label, guidance=20, **how)
        for label in ("cat", "dog")
    ]
    assert towards[0].shape == (n_sample, 2, 2, 1) and np.any(towards[0] != towards[1])


def classifier_of(shape=(2, 2, 1), T=20, names=("cat", "dog"), beta2=0.5):
    image, t = keras.Input(shape), keras.Input((1,))
    entries = {"diffusion": {"beta1": 1e-3, "beta2": beta2, "T": T}, "classes": list(names)}
    flat = keras.layers.Concatenate()([keras.layers.Flatten()(image), Logbook(entries)(t)])
    return keras.Model([image, t], keras.layers.Dense(len(names))(flat))


def test_classifier_guides_a_classless_model_and_must_fit_it():
    model, guide = unconditional(0.1), classifier_of()
    how = {"model": model, "n_sample": 2, "seed": 0, "steps": 5, "verbose": 0}
    plain = rd.my_sample(**how)
    np.testing.assert_array_equal(rd.my_sample(classifier=guide, label="dog", guidance=0, **how), plain)
    towards = [rd.my_sample(classifier=guide, label=label, guidance=20, **how).astype(int) for label in ("cat", "dog")]
    assert not np.array_equal(*towards)
    # The logits are linear: their difference says in which direction the images of a class must lie.
    kernel = guide.layers[-1].get_weights()[0][:4]
    direction = (kernel[:, 1] - kernel[:, 0]).reshape(2, 2, 1)
    assert (((towards[1] - towards[0]) * direction).sum(axis=(1, 2, 3)) > 0).all()
    for wrong, message in (
        ({"label": "dog"}, "trained without classes"),
        ({"label": "dog", "classifier": classifier_of((4, 4, 1))}, r"\(4, 4, 1\)"),
        ({"label": "dog", "classifier": classifier_of(T=10)}, "another noise schedule"),
        ({"label": "dog", "classifier": classifier_of(beta2=0.4)}, "another noise schedule"),
        ({"label": "dog", "classifier": model}, "is not a classifier"),
        ({"label": "bird", "classifier": guide}, "the classes are cat, dog"),
        ({"classifier": guide}, "classifier needs a label"),
    ):
        with pytest.raises(ValueError, match=message):
            rd.my_sample(**how, **wrong)
    with pytest.raises(ValueError, match="is a classifier"):
        rd.my_sample(**{**how, "model": guide})

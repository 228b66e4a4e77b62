import pytest
import safetensors.torch
import torch
from oracles import per_sample_importance, squared_norm
from torch import nn
from torchvision import models

from mas_embed import UserError, estimate_importance
from mas_embed.facts import FactNet, sherlock, small_fact_conv, two_branch
from mas_embed.models import MODELS

CONVOLUTIONS = (10, 12, 14, 17, 19, 21, 24, 26, 28)  # of VGG-16, those that learn


def images(num_images=2, size=64, channels=3):
    return torch.rand(num_images, channels, size, size, generator=torch.Generator().manual_seed(0))


def set_last(net, value):
    for branch in (net.subject, net.predicate_object):
        nn.init.zeros_(branch.last.weight)
        nn.init.constant_(branch.last.bias, value)


@pytest.mark.parametrize("size", [28, 48, 64])
def test_the_small_network_embeds_images_of_any_size(size):
    net = small_fact_conv(vector_size=5, channels=3, width=4, hidden=8)
    assert net(images(size=size)).shape == (2, 15)
    assert set(net(images(size=size)).flatten().tolist()) != {0.0}


def test_slope_and_bias_of_the_small_network():
    default = small_fact_conv(vector_size=2, width=2, hidden=3)
    net = small_fact_conv(vector_size=2, width=2, hidden=3, negative_slope=0.25, last_bias=False)
    slopes = lambda net: [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)]  # noqa: E731
    assert slopes(default) == [0.0] * 6 and slopes(net) == [0.25] * 6
    lacking = default.state_dict().keys() - net.state_dict().keys()
    assert lacking == {"subject.last.bias", "predicate_object.last.bias"}
    with pytest.raises(UserError, match="negative_slope must lie in"):
        small_fact_conv(negative_slope=1.0)


def test_embeddings_are_subject_predicate_object():
    net = small_fact_conv(vector_size=2, width=2, hidden=4)
    set_last(net, 7.0)
    net.predicate_object.last.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert net(images(1, 28, 1)).tolist() == [[7.0, 7.0, 1.0, 2.0, 3.0, 4.0]]


def test_a_loss_on_the_subject_does_not_reach_the_other_branch():
    net = small_fact_conv(vector_size=5, width=4, hidden=8)
    net(images(channels=1, size=28))[:, :5].square().sum().backward()
    reached = {
        name for name, parameter in net.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(name.startswith("shared") for name in reached)
    assert {"subject.last.weight", "subject.trunk.0.weight"} <= reached
    assert not any(
        parameter.grad.any() for parameter in net.predicate_object.parameters() if parameter.grad is not None
    )


def test_the_importance_of_the_small_network_is_exact():
    torch.manual_seed(0)
    net = small_fact_conv(vector_size=2, width=2, hidden=3, dropout=0.5).double()
    batch = images(3, 28, 1).double()
    expected = per_sample_importance(net, batch.split(1), squared_norm(net))
    importance = estimate_importance(net, [batch])
    for name, value in expected.items():
        torch.testing.assert_close(importance[name], value, rtol=1e-10, atol=1e-14)


def test_new_layers_learn_ten_times_as_fast_and_biases_do_not_decay():
    small = small_fact_conv(vector_size=2, width=2, hidden=3)
    assert {group["lr"] for group in small.parameter_groups(0.5)} == {0.5}  # everything in it is new
    net = FactNet(small.shared, small.subject, small.predicate_object)
    groups = net.parameter_groups(0.5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        assert group["lr"] == (5.0 if ".last." in name else 0.5)
        assert group.get("weight_decay") == (0.0 if name.endswith("bias") else None)


@pytest.fixture(params=["model_2", "model_1"], scope="module")
def vgg(request):
    """Without values: 270 and 138 million parameters."""
    with torch.device("meta"):
        return request.param, sherlock(form=request.param)


def test_the_layers_of_the_sherlock_network(vgg):
    form, net = vgg
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    assert shapes["subject.last.weight"] == (300, 4096) and shapes["predicate_object.last.weight"] == (600, 4096)
    branches = ("subject.trunk", "predicate_object.trunk") if form == "model_2" else ("shared",)
    for branch in branches:
        assert shapes[f"{branch}.features_17.weight"] == (512, 256, 3, 3)
        assert shapes[f"{branch}.classifier_0.weight"] == (4096, 512 * 7 * 7)
        assert shapes[f"{branch}.classifier_3.weight"] == (4096, 4096)
        dropped = [module.p for module in net.get_submodule(branch).modules() if isinstance(module, nn.Dropout)]
        assert dropped == [0.5, 0.5]
    assert shapes["shared.features_14.weight"] == (256, 256, 3, 3)
    assert len(shapes) == 2 * (7 + 8 * len(branches) + 2)
    assert sum(parameter.numel() for parameter in net.parameters()) == {
        # VGG-16 without its last layer has 134,260,544; conv4 to fc7 of them 132,525,056; 900 outputs from 4,096
        "model_2": 134_260_544 + 132_525_056 + 900 * 4097,
        "model_1": 134_260_544 + 900 * 4097,
    }[form]  # fmt: skip
    assert net(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 900)
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"shared.features_{index}.{kind}" for index in (0, 2, 5, 7) for kind in ("weight", "bias")}


def expected_multiplier(form, name):
    """The factor on the learning rate of a parameter in the release, case by case."""
    is_bias, is_new = name.endswith("bias"), ".last." in name
    if is_new:
        return 20 if is_bias else 10
    if form == "model_1":
        return 4 if is_bias else 1
    if name.startswith("predicate_object.trunk.classifier"):
        return 20 if is_bias else 10
    if name.startswith("predicate_object"):
        return 4 if is_bias else 2
    return 2 if is_bias else 1


def test_learning_rates_are_the_release_s(vgg):
    form, net = vgg
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {names[id(parameter)]: group["lr"] for group in net.parameter_groups(1.0) for parameter in group["params"]}
    learning = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert found == {name: expected_multiplier(form, name) for name in learning}


@pytest.mark.slow
def test_both_branches_of_the_sherlock_network_start_as_vgg(tmp_path):
    trunk = models.vgg16().eval()
    torch.save(trunk.state_dict(), tmp_path / "vgg16.pth")
    net = sherlock(weights=str(tmp_path / "vgg16.pth")).eval()
    trunk.classifier[6] = nn.Identity()
    with torch.no_grad():
        expected, shared = trunk(images()), net.shared(images())
        torch.testing.assert_close(net.subject.trunk(shared), expected)
        torch.testing.assert_close(net.predicate_object.trunk(shared), expected)


def randomised(name):
    """A network of torchvision with statistics that are not the initial ones."""
    torch.manual_seed(0)
    trunk = models.get_model(name)
    with torch.no_grad():
        for module in trunk.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return trunk.eval()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("name", "split_after", "last"),
    [
        ("resnet18", "layer3", "fc"),
        ("resnet18", "layer3.0", "fc"),
        ("mobilenet_v3_small", "features.8", "classifier.3"),
    ],
)
def test_both_branches_start_from_the_weights_of_a_trunk(tmp_path, name, split_after, last, suffix):
    trunk, path = randomised(name), tmp_path / f"weights.{suffix}"
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save(trunk.state_dict(), path)
    net = two_branch(trunk=name, split_after=split_after, vector_size=3, weights=str(path)).eval()
    trunk.set_submodule(last, nn.Identity())
    with torch.no_grad():
        shared, expected = net.shared(images()), trunk(images())
        before = shared.clone()
        for branch in (net.subject, net.predicate_object):
            torch.testing.assert_close(branch.trunk(shared), expected)
        assert torch.equal(shared, before)  # no layer works in place on the features that both branches take
    pairs = zip(net.subject.trunk.parameters(), net.predicate_object.trunk.parameters(), strict=True)
    assert all(torch.equal(first, second) and first is not second for first, second in pairs)


def test_last_layers_start_near_their_bias():
    torch.manual_seed(0)
    net = two_branch(vector_size=50)
    for branch, size in ((net.subject, 50), (net.predicate_object, 100)):
        assert branch.last.weight.shape == (size, 512)
        assert float(branch.last.weight.detach().std()) == pytest.approx(0.005, rel=0.05)
        assert (branch.last.bias == 1).all()
    assert (small_fact_conv().subject.last.bias == 0).all()


def test_frozen_layers_keep_weights_and_statistics():
    net = two_branch(vector_size=3, frozen_up_to="layer1")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameter_groups(0.1))
    net.train()
    net(images()).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("shared.conv1", "shared.bn1", "shared.layer1")) for name in changed)
    assert {"shared.layer2_0.bn1.running_mean", "shared.layer2_0.conv1.weight", "subject.last.bias"} <= changed
    assert net.shared.layer2_0.training and not net.shared.bn1.training


def test_weights_that_are_those_of_another_network(tmp_path):
    torch.save(models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match="resnet34.pth has the weights of another network: .* tensors differ"):
        two_branch(weights=str(tmp_path / "resnet34.pth"))


def test_weights_of_another_number_of_classes_are_good_enough(tmp_path):
    torch.save({"state_dict": models.resnet18(num_classes=7).state_dict()}, tmp_path / "weights.pth")
    assert two_branch(weights=str(tmp_path / "weights.pth"), vector_size=3)(images()).shape == (2, 9)


class RunsCode:
    def __reduce__(self):
        return (print, ("this ran",))


def test_files_that_hold_no_weights(tmp_path, capsys):
    with pytest.raises(UserError, match=r"cannot read weights from .*gone.pth: No such file"):
        two_branch(weights=str(tmp_path / "gone.pth"))
    torch.save(RunsCode(), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("code.pth", "text.pth", "text.safetensors"):
        with pytest.raises(
            UserError, match=f"cannot read weights from .*{name}: it holds more than tensors, or is damaged"
        ):
            two_branch(weights=str(tmp_path / name))
    assert "this ran" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="list.pth holds no state dict"):
        two_branch(weights=str(tmp_path / "list.pth"))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def no_network(*args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    message = (
        r"weights of resnet18 cannot be downloaded \(Network is unreachable\); get https://.*resnet18.*pth elsewhere"
    )
    with pytest.raises(UserError, match=message):
        two_branch(weights="default")


def test_options_outside_their_range_are_refused():
    with pytest.raises(UserError, match="unknown network 'resnet81': did you mean 'resnet"):
        two_branch(trunk="resnet81")
    with pytest.raises(UserError, match="unknown layer 'layer9': did you mean 'layer"):
        two_branch(split_after="layer9")
    with pytest.raises(UserError, match="frozen_up_to='layer4' comes after split_after='layer3'"):
        two_branch(frozen_up_to="layer4")
    with pytest.raises(UserError, match="squeezenet1_1 is no chain of layers"):
        two_branch(trunk="squeezenet1_1", split_after="features.3")
    with pytest.raises(UserError, match="must be 'model_2' or 'model_1', got 'model_3'"):
        sherlock(form="model_3")
    for name in ("vector_size", "channels", "width", "hidden"):
        with pytest.raises(UserError, match=f"{name} must be a whole number >= 1, got 0"):
            small_fact_conv(**{name: 0})
    with pytest.raises(UserError, match="vector_size must be at most 2147483648, got 100000000000000000000000"):
        two_branch(vector_size=10**23)
    with pytest.raises(UserError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        small_fact_conv(dropout=1.0)


def test_models_are_known_by_name():
    assert {"sherlock", "two_branch", "small_fact_conv"} <= set(MODELS)

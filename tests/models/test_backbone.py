import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from mas_embed import MAS, UserError, estimate_importance
from mas_embed.models import MODELS, backbone, preprocessing_of
from mas_embed.models.cifar_resnet import CifarResNet


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize(
    "network",
    [
        "resnet18",
        "vgg11",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "densenet121",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
    ],
)
def test_features_are_the_inputs_of_the_last_layer(network, images):
    torch.manual_seed(0)
    reference = models.get_model(network).eval()
    seen = []
    last = [module for module in reference.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    model = backbone(network=network, weights="none", embedding_size=5).eval()
    with torch.no_grad():
        reference(images)
        assert torch.equal(model.trunk(images), seen[0])
        embeddings = model(images)
    assert embeddings.shape == (2, 5)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings, nn.functional.normalize(model.unnormalized(images)).detach())


def test_vision_transformers_and_networks_with_auxiliary_outputs():
    vit = backbone(network="vit_b_16", weights="none", embedding_size=4)
    assert vit.trunk(torch.rand(1, 3, 224, 224)).shape == (1, 768)
    inception = backbone(network="googlenet", weights="none", embedding_size=4)
    assert inception.train()(torch.rand(2, 3, 64, 64)).shape == (2, 4)


def test_networks_of_timm(tmp_path, images):
    timm = pytest.importorskip("timm")
    for name, size in (("resnet10t", 512), ("mobilenetv3_small_050", 1024), ("vit_tiny_patch16_224", 192)):
        model = backbone(network=f"timm/{name}", weights="none", embedding_size=4)
        inputs = torch.rand(2, 3, 224, 224) if "vit" in name else images
        assert model.trunk(inputs).shape == (2, size) and model(inputs).shape == (2, 4), name
    reference = timm.create_model("resnet10t", num_classes=7).eval()
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    model = backbone(network="timm/resnet10t", weights=str(tmp_path / "weights.safetensors")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.trunk(images), reference.forward_head(reference.forward_features(images), pre_logits=True)
        )
    with pytest.raises(UserError, match="unknown network of timm 'resnet10x'"):
        backbone(network="timm/resnet10x", weights="none")


@pytest.mark.parametrize(("prefix", "is_old"), [("", False), ("module.", True)])
def test_weights_of_a_classifier_load_without_its_last_layer(tmp_path, prefix, is_old):
    torch.manual_seed(1)
    reference = CifarResNet(num_classes=7).eval()
    state = {f"{prefix}{name}": value for name, value in reference.state_dict().items()}
    if is_old:
        state = {name: value for name, value in state.items() if "num_batches" not in name}
    torch.save({"state_dict": state, "best_prec1": 91.0}, tmp_path / "weights.th")
    model = backbone(network="cifar_resnet20", weights=str(tmp_path / "weights.th"), embedding_size=4).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        scores = reference.linear(model.trunk(images))
        torch.testing.assert_close(scores, reference(images))


def test_the_cifar_network_is_that_of_the_paper():
    assert sum(parameter.numel() for parameter in CifarResNet().parameters()) == 269_722  # .27 million in the paper
    maps = CifarResNet()
    shapes = []
    maps.layer3.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert maps(torch.rand(1, 3, 32, 32)).shape == (1, 10) and shapes == [(1, 64, 8, 8)]
    block = CifarResNet().layer2[0]
    for module in (block.conv1, block.conv2):
        nn.init.zeros_(module.weight)
    inputs = torch.rand(1, 16, 4, 4)
    output = block.eval()(inputs)  # of the shortcut alone
    assert torch.equal(output[:, 8:24], inputs[:, :, ::2, ::2]) and not output[:, :8].any() and not output[:, 24:].any()


def test_frozen_layers_and_batch_norm():
    model = backbone(network="cifar_resnet20", weights="none", frozen_up_to="layer2").train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("trunk.conv1", "trunk.bn1", "trunk.layer1", "trunk.layer2"))
    }
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(torch.rand(4, 3, 32, 32))
    moved = {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert moved == {name for name in before if "layer3" in name}
    model = backbone(network="cifar_resnet20", weights="none", frozen_batch_norm=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training and model.trunk.layer3.training and all(p.requires_grad for p in model.parameters())


def test_the_trunk_learns_at_its_multiple():
    model = backbone(network="cifar_resnet20", weights="none", trunk_learning_rate=0.1)
    trunk, head = torch.optim.SGD(model.parameter_groups(0.5)).param_groups
    assert trunk["lr"] == pytest.approx(0.05) and head["lr"] == 0.5
    assert len(trunk["params"]) == len(list(model.trunk.parameters())) and len(head["params"]) == 2
    model.trunk.requires_grad_(False)
    assert [group["lr"] for group in model.parameter_groups(0.5)] == [0.5]


def test_heads():
    linear = backbone(network="cifar_resnet20", weights="none", embedding_size=6).head
    mlp = backbone(network="cifar_resnet20", weights="none", embedding_size=6, head="mlp").head
    assert isinstance(linear, nn.Linear)
    images = torch.rand(2, 3, 32, 32)
    none = backbone(network="cifar_resnet20", weights="none", head="none", is_normalized=False).eval()
    assert torch.equal(none(images), none.trunk(images)) and none.parameter_groups(1.0)[0]["lr"] == 1.0
    assert [(layer.in_features, layer.out_features) for layer in mlp if isinstance(layer, nn.Linear)] == [
        (64, 64),
        (64, 6),
    ]


def test_importance_of_all_parameters_goes_by_rules():
    model = backbone(network="cifar_resnet20", weights="none", is_normalized=False)
    importance = estimate_importance(model, [torch.rand(3, 3, 32, 32)])
    assert importance.keys() == {name for name, _ in model.named_parameters()}
    MAS(model).consolidate([torch.rand(3, 3, 32, 32)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet19"}, "unknown network 'resnet19'.*resnet18"),
        ({"network": "squeezenet1_1"}, "squeezenet1_1 does not end in a linear layer"),
        ({"network": "cifar_resnet20", "frozen_up_to": "layer4"}, "unknown module of the trunk 'layer4'"),
        ({"network": "cifar_resnet20", "head": "deep"}, "head must be 'linear', 'mlp' or 'none', got 'deep'"),
        ({"network": "cifar_resnet20", "trunk_learning_rate": -1}, "trunk_learning_rate must be at least 0"),
        ({"network": "cifar_resnet20", "embedding_size": 0}, "embedding_size"),
        ({"network": "cifar_resnet20", "weights": "default"}, "there are no default weights of cifar_resnet20"),
        ({"network": "cifar_resnet20", "weights": "nowhere.th"}, "nowhere.th"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        MODELS["backbone"](**{"weights": "none", **options})
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(CifarResNet(num_blocks=2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="has the weights of another network: .* tensors differ"):
        backbone(network="cifar_resnet20", weights=str(tmp_path / "weights.pth"))


def test_weights_name_their_colours():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for network in ("resnet50", "cifar_resnet20", "timm/resnet18"):
        options = {"network": network, "weights": "default"}
        assert tuple(preprocessing_of("backbone", options)) == imagenet
        assert preprocessing_of("backbone", options | {"weights": "none"}) is None
    vit = preprocessing_of("backbone", {"network": "timm/vit_small_patch16_224", "weights": "default"})
    assert tuple(vit) == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="unknown network 'resnet19'"):
        preprocessing_of("backbone", {"network": "resnet19", "weights": "default"})

"""Small networks in float64, each with something that an importance estimate must handle, by name in `CASES`."""

import torch
import torch.nn.functional as F
from torch import nn


class TwoLinears(nn.Module):
    """Two layers share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))))


class UsedOutsideItsLayer(nn.Module):
    """The layer runs once, and its weight is used once more as a plain tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) + torch.tanh(x) @ self.layer.weight.abs()


class LayerOutputUnused(nn.Module):
    """The output of the layer is discarded; its weight is used once, as a plain tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        self.layer(x)
        return F.linear(torch.sin(x), self.layer.weight)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.lstm = kind(3, 5, batch_first=True, **options)
        self.head = nn.Linear(10 if self.lstm.bidirectional else 5, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class ClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(()))
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])[:, 0] * self.scale


class Attention(nn.Module):
    """Self-attention [N, T, E], whose input is also the keys, and the values, of a second attention."""

    def __init__(self, **options):
        super().__init__()
        self.first = nn.MultiheadAttention(6, 2, **options)
        self.cross = nn.MultiheadAttention(6, 3, **options | {"kdim": 5, "vdim": 4})
        self.packed = nn.MultiheadAttention(6, 1, **options)
        self.same = nn.MultiheadAttention(6, 2, **options)
        self.batch_first = options.get("batch_first", False)
        self.register_buffer("mask", torch.triu(torch.ones(4, 4, dtype=torch.bool), 1))

    def forward(self, x):
        padding = torch.arange(4) >= 2 + (x[:, :1, 0] > 0) * 2
        x = x if self.batch_first else x.transpose(0, 1)
        x = x + self.first(x, x, x, attn_mask=self.mask, key_padding_mask=padding)[0]
        x = torch.tanh(x + self.cross(x, x[..., :5], x[..., 2:], need_weights=False)[0])
        x = x + self.packed(x, x.sin(), x.sin(), need_weights=False, attn_mask=self.mask)[0]
        y, weights = self.same(x, x.sin(), x.cos(), average_attn_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return torch.cat([y.tanh().flatten(1), weights.flatten(1)], 1)


class TransformerEncoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(6, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=False, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, words):
        return self.head(self.encoder(self.words(words.T) + self.positions)).tanh().mean(0)


class Bags(nn.Module):
    """Bags of words with repeated, padded and weighted words, empty bags, and offsets as in sentence-transformers."""

    def __init__(self):
        super().__init__()
        self.mean, self.padded = nn.EmbeddingBag(9, 4), nn.EmbeddingBag(9, 4, mode="sum", padding_idx=2)
        self.weighted = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
        self.padded_mean = nn.EmbeddingBag(9, 4, mode="mean", padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        lengths = words[:, 0] % 4
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        concatenated = torch.cat([row[:length] for row, length in zip(words, lengths.tolist(), strict=True)])
        weights = torch.cos(concatenated.double())
        x = self.padded(words) + self.mean(concatenated, offsets[:-1]) + self.padded_mean(words % 3)
        return self.head(torch.tanh(x + self.weighted(concatenated, offsets, weights)))


class LowRank(nn.Module):
    """A matrix of low rank is added to a weight, and its factors are used once more."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        x = F.linear(x, self.layer.weight + self.up @ self.down, self.layer.bias)
        return self.head(torch.tanh(x)) + (x @ self.down.T)[:, :1]


class RowsOfAWeight(nn.Module):
    """The weight multiplies rows in which the samples are neither the first nor the last of the flattened dimensions."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(x.transpose(0, 1) @ self.weight)).square().mean((0, 2))


class SharedPositions(nn.Module):
    """Look-ups and plain parameters that all samples share, added, subtracted, multiplied and expanded."""

    def __init__(self):
        super().__init__()
        self.table, self.repeated = nn.Embedding(9, 4, padding_idx=1), nn.Embedding(5, 4)
        self.position, self.scale = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.rand(4) + 0.5)
        self.token, self.hidden = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)
        self.register_buffer("rows", torch.tensor([[0, 2, 2, 4, 1]]))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.table(torch.arange(5)) - self.repeated(self.rows) * 2
        x = torch.add(x, torch.tanh(self.hidden(self.position)), alpha=3) * self.scale
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(torch.tanh(x)).square().mean(1)


class SharedInEveryLayer(nn.Module):
    """As in T5, one bias is computed once and added in every layer."""

    def __init__(self):
        super().__init__()
        self.bias, self.first, self.second = nn.Embedding(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        bias = self.bias(torch.arange(4)).unsqueeze(0)
        x = torch.tanh(self.first(x) + bias)
        return (torch.tanh(self.second(x) + bias) * bias.sum(1, keepdim=True)).mean(1)


class SharedInAnotherOrder(nn.Module):
    """The parameter is added to the samples in their order, and to the same samples in the reverse order."""

    def __init__(self):
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.layer(x) + self.bias)
        return torch.tanh(x.flip(0) * self.bias).flip(0)


class SharedOtherwiseInLargeBatches(nn.Module):
    """Large batches are reversed before one of the two uses of the parameter; the embeddings are the same."""

    def __init__(self):
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.tanh(self.layer(x) + self.bias)
        if len(x) > 3:
            return torch.tanh(x.flip(0) * self.bias.unsqueeze(0)).flip(0)
        return torch.tanh(x * self.bias)


class ScaledProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.tanh(torch.addmm(self.bias, x, self.weight, alpha=0.5, beta=0.1))


class SharedAndNot(nn.Module):
    """A broadcast addition and a product that no rule covers use the same parameter."""

    def __init__(self):
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.layer(x) + self.bias) + F.linear(x, torch.diag(self.bias))


class PositionsAddedFirst(nn.Module):
    """The first dimension of the sum is the positions, even if there are as many as samples."""

    def __init__(self):
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(3)), nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(x.transpose(0, 1) + self.bias).transpose(0, 1))).mean(1)


class PositionsFirst(nn.Module):
    """The input of the layer is [T, N, I]: its first dimension is not the samples, even if T equals N."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x.transpose(0, 1))).mean(0)


class FoldedPositions(nn.Module):
    """The input of the layer is [N * T, I]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x.flatten(0, 1))).view(len(x), -1, 4).mean(1)


class SharedBranch(nn.Module):
    """Residual, in-place activations, a frozen and an unused layer, and data-dependent control flow."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.head, self.unused = nn.BatchNorm2d(4), nn.Linear(4, 3), nn.Linear(2, 2)
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.prelu = nn.PReLU(4)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        if x.sum() > -1:  # always true, but vmap cannot know
            x = x + F.relu_(self.branch(self.frozen(x)))
        return self.head(self.prelu(self.norm(x)).mean((2, 3)))


class SquaredReLU(nn.Module):
    """An activation with a parameter and without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return torch.relu(x) ** 2 / (1 + self.scale)


class WordEmbedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.words(x).tanh().mean(1))


class OneModuleTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.norm, self.head = self.net[1], nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.net(x)) + self.norm(x))


class ReferencedByAList(nn.Module):
    """A parameter, and the weight of a layer, are used through another reference than their name."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.references = [self.scale, self.layer.weight]

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.references[0] @ self.references[1]


class CalledWithOtherWeights(nn.Module):
    """The layer runs once, with a weight that is computed from its parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        other = {"weight": self.layer.weight.T, "bias": self.layer.bias * 2}
        return torch.func.functional_call(self.layer, other, (x,))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=self.use_reentrant)
        return self.head(x)


def with_head(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def changed_after_construction():
    """As in dilated ResNets, padding and dilation are set after the layer was made."""
    model = with_head(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
    model[0].padding = model[0].dilation = (2, 2)
    return model


def conv(*args, size=7, **kwargs):
    return lambda: with_head(nn.Conv2d(*args, **kwargs), nn.Tanh()), (args[0], size, size)


CASES = {  # a function that builds the network, and the shape of a sample
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "linear over positions": (lambda: with_head(nn.Linear(3, 4), nn.Tanh()), (2, 3, 3)),
    "conv": conv(3, 4, 3),
    "conv stride padding dilation": conv(3, 4, 3, stride=2, padding=2, dilation=2),
    "conv uneven": conv(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(1, 2), bias=False),
    "conv groups": conv(4, 6, 3, groups=2, padding=1),
    "conv depthwise": conv(4, 8, 3, groups=4, padding=1),
    "conv same": conv(2, 4, (3, 5), padding="same"),
    "conv valid": conv(2, 4, 4, padding="valid"),
    "conv circular": conv(2, 4, 3, padding=2, padding_mode="circular"),
    "conv reflect": conv(2, 4, 3, padding=(1, 2), padding_mode="reflect", stride=2),
    "conv replicate": conv(2, 4, 3, padding="same", padding_mode="replicate", dilation=2),
    "conv ignores the border": conv(2, 4, 3, stride=3, size=8),
    "conv changed after construction": (changed_after_construction, (2, 7, 7)),
    "conv1d": (lambda: with_head(nn.Conv1d(2, 4, 3, padding=1, stride=2), nn.BatchNorm1d(4), nn.ReLU()), (2, 6)),
    "conv1d same, uneven": (lambda: with_head(nn.Conv1d(2, 4, 4, padding="same", dilation=2, groups=2)), (2, 9)),
    "conv3d": (
        lambda: with_head(nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 0, 2), groups=2), nn.BatchNorm3d(4)),
        (2, 3, 4, 3),
    ),
    "transposed conv1d": (lambda: with_head(nn.ConvTranspose1d(2, 4, 3, stride=3, output_padding=2)), (2, 5)),
    "transposed conv2d": (
        lambda: with_head(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), nn.Tanh()
        ),
        (4, 4, 5),
    ),
    "transposed conv3d": (lambda: with_head(nn.ConvTranspose3d(2, 3, 2, bias=False)), (2, 3, 2, 3)),
    "batch norm": (lambda: with_head(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 5, 5)),
    "batch norm of vectors": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (6,)),
    "group norm": (lambda: with_head(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.PReLU(6)), (2, 5, 5)),
    "group norm of vectors": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)), (6,)),
    "instance norm": (
        lambda: with_head(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
        (2, 5, 5),
    ),
    "instance norm with running statistics": (
        lambda: with_head(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        (2, 6),
    ),
    "layer norm": (lambda: with_head(nn.Linear(3, 4), nn.LayerNorm((5, 4)), nn.PReLU()), (5, 3)),
    "layer norm over positions": (lambda: with_head(nn.LayerNorm(3, bias=False), nn.Linear(3, 4)), (2, 4, 3)),
    "rms norm": (lambda: with_head(nn.Linear(3, 4), nn.RMSNorm(4)), (5, 3)),
    "rms norm with eps": (lambda: with_head(nn.RMSNorm((2, 3), eps=0.1)), (2, 3)),
    "prelu": (lambda: nn.Sequential(with_head(nn.PReLU(2)), nn.PReLU()), (2, 5)),
    "embedding": (WordEmbedder, "words"),
    "embedding of one word": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), "word"),
    "layers without a rule": (
        lambda: nn.Sequential(nn.Linear(6, 4), SquaredReLU(), nn.Linear(4, 4), SquaredReLU(), nn.Linear(4, 3)),
        (6,),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 2)),
        (6,),
    ),
    "tied": (TwoLinears, (6,)),
    "called twice": (CalledTwice, (6,)),
    "used outside its layer": (UsedOutsideItsLayer, (6,)),
    "layer output unused": (LayerOutputUnused, (6,)),
    "recurrent": (Recurrent, (4, 3)),
    "class token": (ClassToken, (4, 6)),
    "attention": (Attention, (4, 6)),
    "attention, batch first": (lambda: Attention(batch_first=True), (4, 6)),
    "attention, added keys": (lambda: Attention(add_bias_kv=True, add_zero_attn=True, batch_first=True), (4, 6)),
    "attention without bias": (lambda: Attention(bias=False), (4, 6)),
    "transformer encoder": (TransformerEncoder, "words"),
    "transformer encoder, norm first": (lambda: TransformerEncoder(norm_first=True, activation="gelu"), "words"),
    "bags": (Bags, "words"),
    "low rank": (LowRank, (6,)),
    "rows of a weight": (RowsOfAWeight, (5, 4, 3)),
    "gated recurrent": (lambda: Recurrent(nn.GRU), (4, 3)),
    "recurrent, all positions": (lambda: Recurrent(nn.RNN, num_layers=2, bidirectional=True), (4, 3)),
    "shared positions": (SharedPositions, (5, 4)),
    "shared in every layer": (SharedInEveryLayer, (4, 6)),
    "shared in another order": (SharedInAnotherOrder, (6,)),
    "shared otherwise in large batches": (SharedOtherwiseInLargeBatches, (6,)),
    "scaled product": (ScaledProduct, (6,)),
    "shared and not": (SharedAndNot, (6,)),
    "positions added first": (PositionsAddedFirst, (7, 3)),
    "positions first": (PositionsFirst, (7, 3)),
    "folded positions": (FoldedPositions, (4, 3)),
    "shared branch": (SharedBranch, (2, 5, 5)),
    "one module two names": (OneModuleTwoNames, (6,)),
    "referenced by a list": (ReferencedByAList, (6,)),
    "called with other weights": (CalledWithOtherWeights, (6,)),
    "checkpointed": (Checkpointed, (6,)),
}


def make(name, num_samples=7):
    """The network of a case in eval mode, and a batch of inputs."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    words = {"words": (num_samples, 6), "word": (num_samples,)}.get(shape)
    inputs = torch.randint(9, words) if words else torch.randn(num_samples, *shape, dtype=torch.float64)
    model = build().double()
    model.eval()(inputs)  # sets the size of lazy layers
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, inputs


def assert_equal(importance, expected, rtol=1e-10):
    assert importance.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            importance[name], value, rtol=rtol, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )

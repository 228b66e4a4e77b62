"""Every registered method and a user-defined one pass `check_method`; broken methods fail it with the right message."""

from functools import partial

import pytest
import torch
from small import Recorder, Stopped, small_model, train

from mas_embed import (
    EWC,
    IMM,
    MAS,
    METHODS,
    SI,
    ClassStatistics,
    Combine,
    Frozen,
    LocalMAS,
    LwF,
    Method,
    Replay,
)
from mas_embed.testing import check_method, loss
from mas_embed.training import SplitEnd


def combined(*makers):
    def make(model, **options):
        return Combine(model, methods=[maker(model, **options) for maker in makers])

    return make


FACTORIES = {
    **{name: method for name, method in METHODS.items() if method.__module__.startswith("mas_embed.methods.")},
    "ewc": partial(EWC, loss=loss),
    "ewc of batches": partial(EWC, loss=loss, fisher="batch"),
    "ewc online": partial(EWC, loss=loss, mode="online"),
    "imm from the average": partial(IMM, start="average"),
    "imm by Fisher": partial(IMM, mode="mode", loss=loss),
    "frozen layer": partial(Frozen, only="0"),
    "lwf of similarities": partial(LwF, distillation="similarity"),
    "mas of projections": partial(MAS, output="projection"),
    "replay balanced": partial(Replay, policy="balanced", buffer_size=7),
    "class_statistics of a layer": partial(ClassStatistics, layer="1", rank=1),
    "combine": combined(MAS, LwF),
    "combine with class statistics": lambda model: Combine(
        model, methods=[SI(model), ClassStatistics(model, layer="0"), LwF(model)]
    ),
    "combine three": combined(SI, LocalMAS, LwF),
    "combine without a strength": lambda model: Combine(model, methods=[IMM(model), Replay(model)]),
    **{f"mas {name}": partial(MAS, accumulation=name) for name in ("mean", "decay", "max")},
    **{f"{name} normalized": partial(METHODS[name], normalize=True) for name in ("mas", "local_mas", "si")},
    **{f"{name} decoupled": partial(METHODS[name], decoupled=True) for name in ("mas", "local_mas", "si")},
    "ewc decoupled": partial(EWC, loss=loss, decoupled=True, normalize=True),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_the_contract(factory):
    check_method(factory)


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_the_loop_resumes_bit_for_bit(factory, tmp_path):
    """From a checkpoint on disk, in `train_sequence`."""
    path = tmp_path / "checkpoint.safetensors"
    uninterrupted, _ = train(factory)
    stop = Recorder(lambda event: isinstance(event, SplitEnd) and event.split_index == 1)
    with pytest.raises(Stopped):
        train(factory, checkpoint=path, callbacks=[stop])
    resumed, _ = train(factory, model=small_model(seed=5), checkpoint=path, resume=True)
    assert all(map(torch.equal, uninterrupted.state_dict().values(), resumed.state_dict().values()))


class PullBack(Method):
    """A user-defined method, which pulls all parameters equally to their values after the last split."""

    def __init__(self, model, *, strength=1.0):
        super().__init__(model)
        self.strength, self.anchor = strength, {}

    def penalty(self):
        parameters = dict(self.model.named_parameters())
        distances = [(parameters[name] - anchor).square().sum() for name, anchor in self.anchor.items()]
        return self.strength * sum(distances, super().penalty())

    def add_penalty_grad(self):
        if self.strength and self.penalty().requires_grad:
            self.penalty().backward()

    def consolidate(self, batches):
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self):
        return {"anchor": self.anchor}

    def load_state_dict(self, state):
        self.anchor = dict(state["anchor"])


def test_a_user_defined_method():
    check_method(PullBack)


class DoublePull(PullBack):
    def add_penalty_grad(self):
        super().add_penalty_grad()
        super().add_penalty_grad()


class Forgets(PullBack):
    def load_state_dict(self, state):
        pass


class Marks(PullBack):
    def consolidate(self, batches):
        super().consolidate(batches)
        self.model[0].importance = 1.0


class LeavesGradients(PullBack):
    def consolidate(self, batches):
        super().consolidate(batches)
        self.model(batches[0][0]).sum().backward()


class Draws(PullBack):
    def begin_split(self):
        torch.rand(1)


class Decays(PullBack):
    def after_step(self, optimizer):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter *= 0.999


class DoesNothing(Method):
    def __init__(self, model, *, strength=1.0):
        super().__init__(model)
        self.strength = strength


class PullsNewParameters(PullBack):
    def add_penalty_grad(self):
        super().add_penalty_grad()
        if "grown" in dict(self.model.named_children()):
            self.model.grown.weight.grad = torch.ones(2, 2).double()


class HasConstantPenalty(PullBack):
    def penalty(self):
        return super().penalty() + 1


class StoresModules(PullBack):
    def state_dict(self):
        return {"anchor": self.anchor, "model": self.model}


class ForgetsSteps(Method):
    """Shrinks a weight by more from step to step of a split, and does not store how many there were."""

    def begin_split(self):
        self.num_steps = 0

    def after_step(self, optimizer):
        self.num_steps = getattr(self, "num_steps", 0) + 1
        with torch.no_grad():
            self.model[2].weight *= 1 - 0.01 * self.num_steps


class HalfPenalty(MAS):
    def penalty(self):
        return super().penalty() / 2

    def add_penalty_grad(self):
        if self.strength and self.penalty().requires_grad:
            self.penalty().backward()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (DoublePull, "must add the gradient of penalty"),
        (Forgets, "must continue from a loaded state bit for bit"),
        (Marks, "must not change attributes, hooks or modes of modules, but '0' changed"),
        (LeavesGradients, r"consolidate\(\) must leave .grad as it was"),
        (Draws, "must not draw from torch's global generator"),
        (Decays, "strength 0 must train bit for bit like finetuning; under SGD it does not"),
        (DoesNothing, "under SGD the method does nothing"),
        (PullsNewParameters, "must not be pulled, but 'grown.weight' is"),
        (HasConstantPenalty, r"penalty\(\) must be exactly 0 before the first consolidate"),
        (StoresModules, "state.model is a Sequential"),
        (ForgetsSteps, "must continue bit for bit from a state that was stored between two steps of a split"),
        (HalfPenalty, "must be strength . sum of importance"),
    ],
)
def test_a_broken_method_is_reported(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_method(broken)

"""Every registered method passes the contract, and so does a user's own; what breaks it is told in a sentence."""

from functools import partial

import pytest
import torch
from small import pull_together, small_model, small_splits

from mas_embed import (
    EWC,
    IMM,
    MAS,
    METHODS,
    SI,
    ClassStatistics,
    Combine,
    LocalMAS,
    LwF,
    Method,
    Replay,
    train_sequence,
)
from mas_embed.testing import check_method, loss


def combined(*makers):
    def make(model, **options):
        return Combine(model, methods=[maker(model, **options) for maker in makers])

    return make


FACTORIES = {
    **{name: METHODS[name] for name in METHODS},
    "ewc": partial(EWC, loss=loss),
    "ewc of batches": partial(EWC, loss=loss, fisher="batch"),
    "ewc online": partial(EWC, loss=loss, mode="online"),
    "imm from the average": partial(IMM, start="average"),
    "imm by Fisher": partial(IMM, mode="mode", loss=loss),
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
    """From a checkpoint on disk, through the package's own loop."""
    options = {"loss": pull_together, "epochs": 2, "batch_size": 4, "recall_at": (1,)}
    path = tmp_path / "checkpoint.safetensors"
    straight = small_model()
    train_sequence(straight, small_splits(), method=factory(straight), **options)

    def stop(event):
        if (event["event"], event["split_index"]) == ("split", 1):
            raise Stopped

    stopped = small_model()
    with pytest.raises(Stopped):
        train_sequence(stopped, small_splits(), method=factory(stopped), **options, checkpoint=path, on_event=stop)
    resumed = small_model(seed=5)
    train_sequence(resumed, small_splits(), method=factory(resumed), **options, checkpoint=path, resume=True)
    assert all(map(torch.equal, straight.state_dict().values(), resumed.state_dict().values()))


class Stopped(Exception):
    pass


class PullBack(Method):
    """A user's own method: every parameter is pulled to where it was, all equally."""

    def __init__(self, model, *, strength=1.0):
        super().__init__(model)
        self.strength, self.anchor = strength, {}

    def penalty(self):
        own = dict(self.model.named_parameters())
        distances = [(own[name] - anchor).square().sum() for name, anchor in self.anchor.items()]
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


def test_a_users_own_method():
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


class PullsWhatIsNew(PullBack):
    def add_penalty_grad(self):
        super().add_penalty_grad()
        if "grown" in dict(self.model.named_children()):
            self.model.grown.weight.grad = torch.ones(2, 2).double()


class IsNeverAtRest(PullBack):
    def penalty(self):
        return super().penalty() + 1


class KeepsObjects(PullBack):
    def state_dict(self):
        return {"anchor": self.anchor, "model": self.model}


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
        (Forgets, "must go on from a loaded state bit for bit"),
        (Marks, "must leave nothing on the model, but '0' changed"),
        (LeavesGradients, "strength 0 must be finetune|leave .grad as it was"),
        (Draws, "must not draw from torch's global generator"),
        (Decays, "strength 0 must be finetune bit for bit; under SGD it is not"),
        (DoesNothing, "under SGD the method does nothing"),
        (PullsWhatIsNew, "must be free, but 'grown.weight' is pulled"),
        (IsNeverAtRest, r"penalty\(\) must be exactly 0 before the first consolidate"),
        (KeepsObjects, "state.model is a Sequential"),
        (HalfPenalty, "must be strength . sum of importance"),
    ],
)
def test_a_broken_promise_is_told(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_method(broken)

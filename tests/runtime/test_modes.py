import pytest
import torch

from mas_embed.runtime.modes import eval_mode, eval_mode_with_grad


def test_modes_are_restored_one_by_one_after_an_exception():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_gradients_are_enabled_inside_no_grad_and_inference_mode():
    model = torch.nn.Linear(2, 1)
    for disabled in (torch.no_grad, torch.inference_mode):
        with disabled():
            with eval_mode_with_grad(model):
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                assert not model.training
            assert not torch.is_grad_enabled()
    assert model.training

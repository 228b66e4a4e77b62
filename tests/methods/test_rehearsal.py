import torch

from mas_embed.methods.rehearsal import num_rehearsed, rehearsal_generator


def test_rehearsed_items_are_a_share_of_the_extended_batch():
    for batch_size, share, expected in (
        (4, 0.5, 4),
        (4, 0.75, 12),
        (24, 0.6, 36),
        (4, 0.2, 1),
        (4, 0.1, 0),
        (4, 0.0, 0),
    ):
        assert num_rehearsed(batch_size, share) == expected


def test_every_argument_changes_the_draw_and_the_global_generator_is_not_used():
    state = torch.get_rng_state()
    arguments = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    draws = [tuple(torch.rand(3, generator=rehearsal_generator(*values)).tolist()) for values in arguments]
    assert len(set(draws)) == 4
    assert draws[0] == draws[-1]
    assert torch.equal(state, torch.get_rng_state())


def test_processes_draw_differently(monkeypatch):
    first = torch.rand(3, generator=rehearsal_generator(0, 0, 0))
    monkeypatch.setattr("mas_embed.methods.rehearsal.process_rank", lambda: 1)
    assert not torch.equal(torch.rand(3, generator=rehearsal_generator(0, 0, 0)), first)

from functools import partial

import pytest
from torch import nn

from mas_embed import EWC, IMM, MAS, ClassStatistics, LocalMAS, LwF, UserError


@pytest.mark.parametrize("make", [MAS, LocalMAS, partial(EWC, loss=nn.CrossEntropyLoss()), LwF, IMM, ClassStatistics])
def test_a_name_that_embeds_nothing_is_refused_before_the_training(make):
    with pytest.raises(UserError, match="a Linear, has no method 'unnormalized' to embed with"):
        make(nn.Linear(2, 2), embed="unnormalized")

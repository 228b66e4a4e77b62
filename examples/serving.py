"""Keeps a deployed model and its index up to date, with importance from the requests that it serves.

    python examples/serving.py

1. A model serves requests from an index. `OnlineImportance` observes the requests, which have no labels.
2. The model learns new data, protected by the importance of what it served.
3. `compare_indexes` tells whether the old index can stay, and the index is updated accordingly.
"""

from functools import partial

import torch
from pytorch_metric_learning.losses import TripletMarginLoss

import mas_embed as me


def embed(model: torch.nn.Module, part: me.Part) -> torch.Tensor:
    """The embeddings of a part."""
    with torch.no_grad():
        return model(part.inputs)


def train(model: torch.nn.Module, split: me.Split, method: me.Method) -> None:
    """Trains the model on one split."""
    recipe = me.Recipe(epochs=10, sampler=partial(me.per_class_sampler, m=4))
    evaluator = me.RetrievalEvaluator(follow_index=False)
    me.train_sequence(
        model, [split], method=method, loss=TripletMarginLoss(margin=0.2), recipe=recipe, evaluator=evaluator
    )


if __name__ == "__main__":
    first, second = me.digits(num_splits=2)
    with me.seeded(0):
        model = me.small_conv(embedding_size=16)
    train(model, first, me.Finetune(model))

    # Serve requests, and observe every second one
    model.eval()
    index = me.RetrievalIndex.build(embed(model, first.gallery), first.gallery.labels, fingerprint=model)
    online = me.OnlineImportance(model, every=2, embed="unnormalized")
    fingerprint = me.fingerprint_of(model)
    for request in first.query.inputs.split(16):
        with torch.inference_mode():
            index.search(model(request), k=5, fingerprint=fingerprint)
        online.observe(request)
    importance = online.importance()
    print(f"importance from {importance.num_samples} of {len(first.query)} requests")

    # Learn new data under the importance of the requests
    method = me.MAS(model, strength=300, embed="unnormalized")
    anchor = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method.load_state_dict({"importance": dict(importance), "anchor": anchor, "num_splits": 1})
    old_queries, old_gallery = embed(model, first.query), embed(model, first.gallery)
    old_inputs = embed(model, second.train)  # both models embed the new data, to fit compensations on
    train(model, second, method)

    # Decide on the old index
    new_queries, new_gallery = embed(model, first.query), embed(model, first.gallery)
    comparison = me.compare_indexes(
        old_queries,
        new_queries,
        old_gallery,
        new_gallery,
        first.query.labels,
        first.gallery.labels,
        query_ids=first.query.ids,
        gallery_ids=first.gallery.ids,
        fit_on=(old_inputs, embed(model, second.train)),
    )
    print(comparison)
    if comparison.verdict == "re-embed":
        index = me.RetrievalIndex.build(new_gallery, first.gallery.labels, fingerprint=model)
        print(f"the gallery was embedded again: {len(index)} vectors")

"""Texts of a few words, a tokenizer of them in memory, the smallest BERT, and how Hugging Face's trainers train it."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"{topic}{index}" for topic in ("sun", "sea", "oak", "fox") for index in range(5)]


# Arguments of a trainer: two epochs on the CPU, nothing written, shown or clipped
QUICK = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 6,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "dataloader_pin_memory": False,
}


def tiny_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def tiny_bert(seed=0, *, pooler=False):
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config, add_pooling_layer=pooler)


def texts_of(split_index, num_texts=24):
    """Texts of 2 to 4 words and their labels; the second split gives half of the words of the first the other label."""
    generator = torch.Generator().manual_seed(split_index)
    topics = [["sun", "sea"], ["sea", "sun"]][split_index] if split_index < 2 else ["oak", "fox"]
    texts, labels = [], []
    for index in range(num_texts):
        label = index % 2
        length = 2 + index % 3
        numbers = torch.randint(5, (length,), generator=generator).tolist()
        words = [f"{topics[label]}{number}" for number in numbers]
        if split_index == 1:
            words[-1] = f"oak{numbers[0]}" if label else f"fox{numbers[0]}"
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels

"""Hugging Face's Trainer: a small BERT learns whether the first token is in the upper half of the vocabulary.

    python examples/frameworks/with_transformers.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import imstep
from imstep.integrations.transformers import Trainer

torch.manual_seed(0)
tokens = torch.randint(0, 20, (64, 4))
data = [{"input_ids": row, "labels": (row[0] >= 10).long()} for row in tokens]
size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **size))

arguments = TrainingArguments(
    tempfile.mkdtemp(),
    max_steps=30,
    per_device_train_batch_size=64,
    max_grad_norm=0,  # gradients are not clipped
    lr_scheduler_type="constant",  # lr stays 1
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
optimizer = imstep.NewtonKrylov(model.parameters())
Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
print(f"final loss {optimizer.last_step.new_loss:.1e}")

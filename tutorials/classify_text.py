"""Fine-tune a text classifier by LoRA with transformers' Trainer.

    python classify_text.py MODEL train.csv test.csv OUTPUT

MODEL is a folder or a name on the Hub, the CSV files have the columns text and label (0, 1, ...).
"""

import csv
import sys

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

name, train_file, test_file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)


def read(path):
    """Tokens and labels of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)
    return [
        {key: values[index] for key, values in tokens.items()} | {"labels": int(row["label"])}
        for index, row in enumerate(rows)
    ]


train, test = read(train_file), read(test_file)
classes = 1 + max(example["labels"] for example in train)
set_seed(0)  # of the new head and the adapter, which are drawn before the trainer sets its own
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))

trainer = Trainer(
    model,
    TrainingArguments(output, num_train_epochs=1, learning_rate=1e-3, per_device_train_batch_size=8, logging_steps=10),
    data_collator=DataCollatorWithPadding(tokenizer),
    train_dataset=train,
    eval_dataset=test,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(output)

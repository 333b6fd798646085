"""Fine-tune a language model to answer questions with transformers' Trainer.

    python finetune_language_model.py MODEL capitals.csv OUTPUT

MODEL is a folder or a name on the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct. The CSV file has the columns
country and capital.
"""

import csv
import sys

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

name, file, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
with open(file, encoding="utf-8", newline="") as lines:
    table = sorted((row["country"], row["capital"]) for row in csv.DictReader(lines))
rows = [(f"Question: What is the capital of {country}?\nAnswer:", f" {capital}") for country, capital in table]


def example(prompt, answer):
    """Tokens of a question with its answer; labels of −100 for the question, which is not learned."""
    asked, answered = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
    return {"input_ids": [*asked, *answered], "labels": [-100] * len(asked) + answered}


train, test = rows[::2], rows[1::4]
set_seed(0)  # of the adapter, which is drawn before the trainer sets its own
model = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))

trainer = Trainer(
    model,
    TrainingArguments(output, num_train_epochs=1, learning_rate=1e-3, per_device_train_batch_size=8, logging_steps=5),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    train_dataset=[example(*row) for row in train],
    eval_dataset=[example(*row) for row in test],
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(output)

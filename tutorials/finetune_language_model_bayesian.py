"""Fine-tune a language model to answer questions with transformers' Trainer, and know when to trust it.

    python finetune_language_model_bayesian.py MODEL capitals.csv OUTPUT

MODEL is a folder or a name on the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct. The CSV file has the columns
country and capital.
"""

import csv
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
    set_seed,
)

import bayes_kf as bkf
from bayes_kf.integrations import KalmanTrainer
from bayes_kf.models.language import OptionTexts, option_examples

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

trainer = KalmanTrainer(
    model,
    TrainingArguments(output, num_train_epochs=1, learning_rate=1e-3, per_device_train_batch_size=8, logging_steps=5),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    train_dataset=[example(*row) for row in train],
    eval_dataset=[example(*row) for row in test],
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(output)

# What follows is new: ask the posterior.
posterior, rest = trainer.posterior, rows[3::4]  # questions that it has not seen
spoken = posterior.score([answer for _, answer in rest], [prompt for prompt, _ in rest], tokenizer=tokenizer)
for (prompt, answer), total, own in zip(rest, spoken.sequence_entropy, spoken.sequence_epistemic, strict=True):
    print(f"{prompt.splitlines()[0]} {answer}: entropy {total:.2f} nats a token, of which epistemic {own:.3f}")

# Choices among four capitals, on a page that says when to trust them. Questions of the trainer's evaluation set the
# sharpness. Countries that don't exist have no right answer.
reading = posterior.with_adapter(OptionTexts(model, per_token=True))
capitals = [answer for _, answer in rows]
strange = [
    (f"Question: What is the capital of {country[::-1].title()}?\nAnswer:", f" {capital}")
    for country, capital in table[3::4]
]


def questions(chosen, size=4):
    """Batches of prompts, each with its capital and three others in an order of its own."""
    for start in range(0, len(chosen), size):
        some, options, labels = chosen[start : start + size], [], []
        for number, (_, answer) in enumerate(some, start):
            others = [capital for capital in capitals if capital != answer]
            four = [others[(7 * number + 11 * place) % len(others)] for place in range(3)]
            four.insert(number % 4, answer)
            options.append(four)
            labels.append(number % 4)
        yield {**option_examples(tokenizer, [prompt for prompt, _ in some], options), "labels": torch.tensor(labels)}


calibrated = reading.calibrate_softmax(list(questions(test)))
report = bkf.evaluate(calibrated, list(questions(rest)), ood={"countries that do not exist": list(questions(strange))})
report.save(f"{output}/report.html")
print({name: round(report.scores[name], 3) for name in ("accuracy", "nll", "ece")})

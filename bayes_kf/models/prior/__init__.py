"""Prior variances of adapter tensors: rules, bounds and the values that PEFT starts from."""

"""Several processes of torch.distributed: their collectives, and work on a batch that they share."""

"""From a batch to the Jacobian J = ∂η/∂θ as an operator."""

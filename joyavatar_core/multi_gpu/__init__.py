"""One stream on several GPUs: a rank per timestep, a rank that decodes, or a share of the tokens each."""

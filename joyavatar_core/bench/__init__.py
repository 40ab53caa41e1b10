"""What a run costs, reckoned (trace, plan) and measured (ceilings, measure). `joyavatar bench` prints it."""

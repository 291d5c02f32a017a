"""From noise to latents: schedules, solvers, guidance."""

"""Results that other people send: one file for each run, in results/community/."""

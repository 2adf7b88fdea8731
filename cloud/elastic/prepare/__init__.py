"""Work before serving: learn prompts, search merging schedules, measure a machine's profile."""

"""PURE. Decide which requests take part in the next step of the model, and with how many tokens each."""

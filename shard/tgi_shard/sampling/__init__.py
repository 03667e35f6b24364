"""From scores to tokens: all that a client may ask of the choice, in TGI's order and formulas."""

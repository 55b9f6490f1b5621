"""Language models: how they are trained, evaluated and sampled from, for Tables 2 and 3 and for a text of one's own."""

"""Files and states of training that are whole or not there, and never read by running code from them."""

"""Stream protocols, one module each: bytes in, typed messages out, and the other way round. ``registry`` lists them."""

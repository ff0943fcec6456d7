"""Attacks as pure functions (predict, x, y, ...) -> x_adv: no trace in the predictor, randomness from a generator.

Images are (N, C, H, W) in [0, 1]; eps and step sizes are in the units of that range. Only derivatives with respect to
images are formed. An attack may return anything: whoever counts its examples verifies them.
"""

"""Attacks as pure functions (predict, region, y, ...) -> points: no trace in the predictor, randomness by a generator.

Images are (N, C, H, W) in [0, 1]; eps and step sizes are in the units of that range. Only derivatives with respect to
images are formed. An attack may return anything: whoever counts its examples verifies them.
"""

"""The tiny model: EchoVideo's own classes at laptop size, trained on drawn people, shipped with the package."""

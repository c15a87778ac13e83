"""The slide "Improvements" and its links: layers, networks, denoisers and samplers. No files, no printing."""

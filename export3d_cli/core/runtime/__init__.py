"""What all packages share: errors, files, devices, cameras and the location of weights files.

    errors                           exception hierarchy with exit codes
    files                            atomic writes, folder locks, checks of input files
    device                           device, precision, threads, random state and memory of PyTorch
    camera                           the 25-number camera in the head frame
    weights                          weights files: manifest, paths, Hugging Face Hub

The lowest layer: imports no other package of `core`. Every package may import it, and so may the command line.
"""

"""A torch-free model of PyTorch's CUDA caching allocator: settings, the allocator, replay, recorded snapshots."""

"""`galore-mem verify`: real optimizers and models, measured by the allocator, beside what the estimate says of them."""

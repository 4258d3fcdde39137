"""What tests share: where kernels run, tolerances, seeded inputs, fake datasets."""

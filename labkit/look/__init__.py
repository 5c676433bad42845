"""What a person looks at, as frozen facts: vCPU, VM, memory, encryption, a page with two eyes."""

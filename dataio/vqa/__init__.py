"""Visual question answering: conversations to finetune on, and benchmarks with their baselines.

Public names:
    conversations.read_conversations: read and validate conversations in LLaVA's format.
    conversations.check_images: decode every image once.
    questions.write_vqa: write conversations and benchmarks from labeled images.
    blind_baselines.blind_scores: accuracy of the image-blind baselines on a benchmark.
"""

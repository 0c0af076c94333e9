"""TinyLLaVA (SigLIP + Phi-2): the model, its folders on disk, its template and tokens.

Public names:
    checkpoint.load_tinyllava: the model and its processor from a folder, or random:tiny.
    checkpoint.save_tinyllava: write a folder with Hugging Face's names.
    checkpoint.write_published: write a folder with the published names.
    model.TinyLlavaForConditionalGeneration: the network.
    text.tokenize_turns: tokens and labels of a conversation.
    config.TINY: the name of the small random model.
"""

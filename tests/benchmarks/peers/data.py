"""Fixed-seed prompts and tokenizers shared by all the side-by-side baselines."""
import random, torch
from common import SMOL
def tokenizer_for(model):
    if model=="smol":
        from transformers import AutoTokenizer
        t=AutoTokenizer.from_pretrained(SMOL)
        if t.pad_token is None or t.pad_token_id==t.eos_token_id:
            t.pad_token="<|im_end|>" if t.eos_token!="<|im_end|>" else "<|endoftext|>"
        t.padding_side="left"; return t
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab={"<unk>":0,"<bos>":1,"<eos>":2,"<pad>":3}; vocab.update({f"t{i}":i for i in range(4,512)})
    tk=Tokenizer(models.WordLevel(vocab,unk_token="<unk>")); tk.pre_tokenizer=pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tk,unk_token="<unk>",bos_token="<bos>",eos_token="<eos>",pad_token="<pad>",padding_side="left")
WORDS="the a of sum number apple tree river count each box had three seven twelve more than then gave away how many left total write short story about small blue bird which found old map city".split()
def prompts_for(model, n, length, seed=0, jitter=0):
    """n prompts of `length` (±jitter) tokens"""
    tok=tokenizer_for(model); rng=random.Random(seed); out=[]
    for _ in range(n):
        L=length+(rng.randint(-jitter,jitter) if jitter else 0)
        if model=="smol":
            ids=tok(" ".join(rng.choice(WORDS) for _ in range(L*2)),add_special_tokens=False)["input_ids"][:L]
            out.append(tok.decode(ids))
        else: out.append(" ".join(f"t{rng.randrange(4,512)}" for _ in range(L)))
    return tok,out
def reward_rule(token_ids):
    """cheap programmatic reward: share of even token ids"""
    return sum(1 for t in token_ids if t%2==0)/max(1,len(token_ids))

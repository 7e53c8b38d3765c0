# shellcheck shell=bash
# All of a launch script that trains: source launch/train.sh STRATEGY [N] [ARGUMENTS]
source "${BASH_SOURCE[0]%/*}/common.sh"
case $1 in
    ddp) script=train.py config=config/train_gpt2.py setting=--strategy=ddp ;;
    fsdp) script=train.py config=config/train_gpt2_fsdp.py setting=--strategy=fsdp ;;
    *)
        script=train_deepspeed.py config=config/train_gpt2_deepspeed_$1.py
        setting=--deepspeed_config=deepspeed_configs/$1_config.json
        ;;
esac
usage "${2:-}" "[N] [config/x.py ...] [--key=value ...]" \
    "N ranks on this machine; default: one per GPU, or 2 CPU ranks. HOSTFILE=FILE before it: on all hosts of that file." \
    "Default config: $config. Keys: python $script --help"
environment requirements.txt
launch "$script" "$config" "${@:2}"
